"""The oracle against plain transformers: full sequences when dense, hidden KV columns when sparse."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tinypd import BLOCKS, FAMILIES, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend


@torch.no_grad()
def reference(oracle, prompt, continuation):
    """Whole KV in transformers' own cache; in a sparse layer the rows that were not sent are masked."""
    plan, n = oracle.plan, len(prompt)
    out = oracle.prefill_model(prompt[None], use_cache=True)
    logits, past = [out.logits[:, -1]], transformers.DynamicCache()
    for layer, source in enumerate(plan.layer_map):
        held = out.past_key_values.layers[source]
        past.update(held.keys.clone(), held.values.clone(), layer)
    hooks = []
    for block, send in zip(oracle.decode_model.model.layers, plan.kv, strict=True):
        sent = torch.tensor([any(lo <= at < hi for lo, hi in send.row_ranges(n)) for at in range(n)])

        def mask(module, args, kwargs, sent=sent):
            before = past.layers[module.self_attn.layer_idx].keys.shape[2]
            columns = torch.cat((sent, torch.ones(before + 1 - n, dtype=torch.bool)))
            kwargs["attention_mask"] = torch.where(columns, 0.0, -torch.inf)[None, None, None]
            return args, kwargs

        hooks.append(block.register_forward_pre_hook(mask, with_kwargs=True))
    for at, token in enumerate(continuation[:-1]):
        positions = torch.tensor([[n + at]])
        out = oracle.decode_model(token[None, None], past_key_values=past, position_ids=positions, use_cache=True)
        logits.append(out.logits[:, -1])
    for hook in hooks:
        hook.remove()
    return torch.cat(logits).log_softmax(-1).gather(1, continuation[:, None])[:, 0]


def close(a, b, tolerance=1e-4):
    assert a.dtype == b.dtype == torch.float32
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_equals_the_full_sequence(family, attention):
    model, ids = tiny(family, attention), text(3, 30)
    oracle = make_oracle(model, make_plan())
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    close(oracle.score(oracle.prefill(ids[:, :12]), ids[:, 12:]), plain[:, 11:])
    for row, expected in zip(ids, plain, strict=True):
        close(oracle.logprobs(row[:1], row[1:]), expected)  # a prompt of one token
        close(oracle.logprobs(row[:-1], row[-1:]), expected[-1:])  # prefill alone


def test_sliding_window_equals_the_full_sequence():
    ids = text(2, 30)
    for family, config in (("Mistral", {}), ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2})):
        model = tiny(family, sliding_window=7, **config)
        with torch.no_grad():
            plain = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        oracle = make_oracle(model, make_plan())
        close(oracle.score(oracle.prefill(ids[:, :12]), ids[:, 12:]), plain[:, 11:])


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_and_dropped_equal_masked_whole_kv(family):
    first, last = (KVSend(mode="sparse", n_first=f, n_last=n) for f, n in ((3, 0), (0, 2)))
    plan = make_plan(prefill=(1,), decode=(1, 3), kv=(SPARSE, first, last))
    model, ids = tiny(family), text(1, 26)[0]
    oracle = make_oracle(model, plan)
    expected = reference(oracle, ids[:15], ids[15:])
    close(oracle.logprobs(ids[:15], ids[15:]), expected)
    dense_kv = oracle.with_kv((KVSend(),) * 3)
    assert (dense_kv.logprobs(ids[:15], ids[15:]) - expected).abs().max() > 1e-2  # what is tested does matter


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_plan_equals_the_reference(data):
    decode = data.draw(st.sets(st.integers(0, BLOCKS - 1), max_size=BLOCKS - 1))
    prefill = {block for block in decode if data.draw(st.booleans())}
    kv = []
    for _ in range(BLOCKS - len(decode)):
        first, last = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        kv.append(KVSend(mode="sparse", n_first=first, n_last=last) if first + last else KVSend())
    tokens, prompt = data.draw(st.integers(2, 16)), data.draw(st.integers(1, 15))
    ids = text(1, tokens + prompt, seed=data.draw(st.integers(0, 99)))[0]
    oracle = make_oracle(tiny("Llama"), make_plan(prefill, decode, kv))
    close(oracle.logprobs(ids[:prompt], ids[prompt:]), reference(oracle, ids[:prompt], ids[prompt:]))


def test_a_prompt_no_longer_than_first_plus_last_is_dense():
    ids, model = text(1, 20)[0], tiny("Llama")
    dense, sparse = (make_oracle(model, make_plan(kv=(send,) * BLOCKS)) for send in (KVSend(), SPARSE))
    for prompt in (1, 2, 5):
        assert torch.equal(sparse.logprobs(ids[:prompt], ids[prompt:]), dense.logprobs(ids[:prompt], ids[prompt:]))
    assert not torch.allclose(sparse.logprobs(ids[:6], ids[6:]), dense.logprobs(ids[:6], ids[6:]), atol=1e-3)


def test_greedy_is_the_mode_of_one_pass_scoring():
    plan = make_plan(decode=(2,), kv=(SPARSE, KVSend(), SPARSE, KVSend()))
    oracle, prompt = make_oracle(tiny("Qwen3"), plan), text(1, 14)[0]
    out = oracle.greedy(prompt, 10)
    ids, logprobs = oracle.top_logprobs(prompt, out, 3)
    assert torch.equal(ids[:, 0], out)
    close(logprobs[:, 0], oracle.logprobs(prompt, out))
    assert (logprobs[:, 0] - logprobs[:, 1]).min() > 1e-4  # no tie that rounding could turn


def test_a_prefill_state_serves_several_plans_and_is_left_unchanged():
    ids, model = text(2, 24), tiny("Mistral")
    oracle = make_oracle(model, make_plan())
    state = oracle.prefill(ids[:, :14])
    before = [pool.clone() for pool in (*state.keys, *state.values)]
    dense = oracle.score(state, ids[:, 14:])
    sparse = oracle.with_kv((SPARSE,) * BLOCKS).score(state, ids[:, 14:])
    assert torch.equal(dense, oracle.score(state, ids[:, 14:]))
    assert all(torch.equal(a, b) for a, b in zip(before, (*state.keys, *state.values), strict=True))
    for row in range(2):
        close(
            sparse[row],
            make_oracle(model, make_plan(kv=(SPARSE,) * BLOCKS)).logprobs(ids[row, :14], ids[row, 14:]),
        )


def test_prompt_kv_takes_the_dtype_of_the_plan():
    ids, model = text(1, 24)[0], tiny("Llama")
    exact, half = (make_oracle(model, make_plan(kv_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    error = (exact.logprobs(ids[:14], ids[14:]) - half.logprobs(ids[:14], ids[14:])).abs()
    assert error[0] == 0  # the first token is prefill's own
    assert 1e-5 < error[1:].max() < 0.1


@pytest.mark.parametrize(("wire", "least", "most"), [("int8", 1e-5, 0.03), ("fp8", 1e-3, 0.3), ("int4", 1e-2, 1.0)])
def test_prompt_kv_travels_in_its_wire_dtype(wire, least, most):
    """Tiny random models feel KV errors strongly: the figures only tell the dtypes from each other and from noise."""
    ids, model = text(4, 40), tiny("Llama")
    oracle = make_oracle(model, make_plan())
    state = oracle.prefill(ids[:, :20])
    sent = oracle.with_kv((KVSend(wire_dtype=wire),) * BLOCKS)
    error = (sent.score(state, ids[:, 20:]) - oracle.score(state, ids[:, 20:])).abs()
    assert (error[:, 0] == 0).all()  # the first token is prefill's own
    assert least < error[:, 1:].mean() < most
    first_layer = oracle.with_kv((KVSend(wire_dtype=wire), *(KVSend(),) * (BLOCKS - 1)))
    assert 0 < (first_layer.score(state, ids[:, 20:]) - oracle.score(state, ids[:, 20:])).abs().mean() < error.mean()


def test_models_that_do_not_fit_the_plan_are_refused():
    with pytest.raises(ValueError, match="decode model has 5 layers, the plan 4"):
        PDOracle(tiny("Llama"), tiny("Llama"), make_plan(decode=(2,)))
