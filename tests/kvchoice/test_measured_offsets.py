"""Key offsets and scales measured on models whose keys hold a constant, or matter more in some channels; or neither."""

from types import SimpleNamespace

import pytest
import torch
from ropes import ROPES
from tinypd import BLOCKS, DIM, FAMILIES, HEADS, KV_HEADS, biased, make_oracle, make_plan, text, tiny

from pdtrim_deploy.kvcache.key_constants import MAX_EXPONENT, STEPS
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, rotate
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.kvchoice.budget.effects import Measure
from pdtrim_deploy.kvchoice.key_scales import exponents, pair_sums, query_squares
from pdtrim_deploy.kvchoice.offsets import measure
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend

LONG = 800  # so many tokens that chance helps nobody
INT4 = (KVSend(wire_dtype="int4"),) * BLOCKS


@pytest.fixture(scope="module")
def model():
    return biased()


@pytest.fixture(scope="module")
def measured(model):
    return measure(make_oracle(model, make_plan()), text(8, 48), lambda _: None)


def silent(_):
    pass


@pytest.mark.parametrize("rope", ROPES)
def test_means_are_those_of_keys_before_rope(rope):
    model, plan, ids = biased(rope_parameters=ROPES[rope]), make_plan(decode=(1,)), text(4, 32)
    offsets = measure(make_oracle(model, plan), ids, silent).offsets
    seen = {}
    for block in plan.decode_layers:
        model.model.layers[block].self_attn.k_proj.register_forward_hook(
            lambda _m, _a, out, block=block: seen.setdefault(block, out)
        )
    with torch.no_grad():
        model(ids[:3])
    for layer, block in enumerate(plan.decode_layers):  # three of four sequences, less their first tokens
        mean = seen[block][:, 1:].flatten(0, 1).mean(0).view(KV_HEADS, DIM)
        torch.testing.assert_close(offsets.layers[layer].mean, mean, rtol=1e-4, atol=1e-3)


def test_errors_say_what_it_brings(measured):
    assert measured.offsets.file.layers == tuple(range(BLOCKS))
    assert len(measured.errors) == BLOCKS
    assert all(with_offsets < without / 10 for heads in measured.errors for without, with_offsets in heads)


def test_decode_reads_nearly_the_native_keys(model, measured):
    native, ids = make_oracle(model, make_plan()), text(3, 80, seed=5)
    state = native.prefill(ids[:, :64])
    expected = native.score(state, ids[:, 64:])
    without = native.with_kv(INT4).score(state, ids[:, 64:])
    with_offsets = native.with_offsets(measured.offsets).with_kv(INT4).score(state, ids[:, 64:])
    assert (with_offsets - expected).square().mean() < (
        without - expected
    ).square().mean() / 4  # values are rounded too


def test_a_budget_is_judged_on_keys_less_their_offset(model, measured):
    plain = make_oracle(model, make_plan())
    harm = [
        Measure(Problem(oracle, text(4, 40, seed=9), 32), (KVSend(), INT4[0]), silent).divergence(INT4)
        for oracle in (plain, plain.with_offsets(measured.offsets))
    ]
    assert harm[1] < harm[0] / 4


def test_an_oracle_has_the_offsets_of_its_plan_and_no_others(model, measured):
    oracle = make_oracle(model, make_plan())
    with_offsets = oracle.with_offsets(measured.offsets)
    assert with_offsets.with_kv(INT4).plan.key_offsets == measured.offsets.file
    assert with_offsets.with_offsets(None).plan == oracle.plan
    with pytest.raises(ValueError, match="not the plan's"):
        PDOracle(model, model, with_offsets.plan)
    with pytest.raises(ValueError, match="not the plan's"):
        PDOracle(model, model, oracle.plan, measured.offsets)


class FixedKeys:
    """An oracle whose prefill makes given keys `[sequences, layers, tokens, heads, dim]`, RoPE included.

    Queries are zero, so that no scale helps, unless channels of pair 0 are to have `queries` times the others'.
    """

    def __init__(self, model, keys, queries=None):
        self.prefill_model = self.decode_model = model
        self.plan, self._keys, self.decode = make_plan(), iter(keys), Blockwise(model)
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight.data.view(HEADS, 2, DIM // 2, -1)
            weight[:, :, 0] *= queries or 0.0
            weight *= queries is not None

    def prefill(self, _):
        return SimpleNamespace(keys=tuple(next(self._keys)))


def test_heads_without_a_constant_have_none_and_layers_of_such_heads_are_left_out():
    keys = torch.randn(20, BLOCKS, LONG, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    model = tiny("Llama")
    constant, rotary = torch.full((DIM,), 9.0), KeyOffsets.make({0: torch.zeros(1, DIM)}, torch.ones(1), 1.0)
    rotary.frequencies = model.model.rotary_emb.inv_freq
    rotary._tables = [torch.empty(0, DIM)]
    turned = rotate(constant, *rotary.table(LONG)[:LONG].chunk(2, -1))
    keys[:, 2, :, 1] += turned
    keys[:, 4, :, 0, 3] = torch.nan
    offsets = measure(FixedKeys(model, keys), text(20, LONG), silent).offsets
    assert offsets.file.layers == (2,)
    assert not offsets.layers[2].mean[0].any()
    torch.testing.assert_close(offsets.layers[2].mean[1], constant, rtol=0, atol=0.3)


def test_a_model_whose_keys_hold_no_constant_has_no_offsets():
    keys = torch.randn(20, BLOCKS, LONG, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    assert measure(FixedKeys(tiny("Llama"), keys), text(20, LONG), silent).offsets is None


def test_channels_that_queries_read_most_have_the_largest_scales():
    keys = torch.randn(8, BLOCKS, LONG, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    keys[:, 1, :, 0] = torch.nan
    measured = measure(FixedKeys(tiny("Llama"), keys, queries=30.0), text(8, LONG), silent)
    scaled = [(layer, head) for layer in range(BLOCKS) for head in range(KV_HEADS) if (layer, head) != (1, 0)]
    for layer, head in scaled:
        constants = measured.offsets.layers[layer]
        assert not constants.mean.any()
        pairs = constants.scale[head].view(2, -1)
        assert torch.equal(pairs[0], pairs[1])
        torch.testing.assert_close(constants.inverse[head] * constants.scale[head], torch.ones(DIM))
        assert pairs[0, 0] >= 2 * pairs[0, 1:].max()
        without, with_scales = measured.product_errors[layer][head]
        assert with_scales < 0.8 * without
    assert (measured.offsets.layers[1].scale[0] == 1).all()
    assert measured.offsets.file.scaled


def test_product_errors_are_those_of_products():
    """Of random queries as large as the model's, with keys as they come back."""
    oracle, ids = make_oracle(biased(5.0), make_plan()), text(4, 200)
    measured = measure(oracle, ids, silent)
    offsets = measured.offsets
    squares = query_squares(oracle, ids[:3])
    state = oracle.prefill(ids[3:])
    for scales, with_offsets in ((1, offsets), (0, offsets.unscaled())):
        sending = oracle.with_offsets(with_offsets).with_kv((KVSend(wire_dtype="int4"),) * BLOCKS)
        held = sending.hand_over(state)
        for layer in range(BLOCKS):
            apart = (held[layer].keys[0].transpose(0, 1) - state.keys[layer])[1:].double()
            sizes = squares[layer].repeat(1, 2) / 2
            random = (
                torch.randn(4000, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1)).double() * sizes.sqrt()
            )
            product = torch.einsum("qhd,thd->hqt", random, apart).square().mean((1, 2)).sqrt()
            known = torch.tensor([pair[scales] for pair in measured.product_errors[layer]], dtype=torch.float64)
            torch.testing.assert_close(product, known, rtol=0.1, atol=0)


@pytest.mark.parametrize("family", [*FAMILIES, "Apertus", "Exaone4"])  # the last two norm queries behind a transpose
def test_queries_are_as_large_as_attention_sees_them(family, monkeypatch):
    model, seen = tiny(family), []
    usual = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *a, **k: seen.append(query) or usual(query, *a, **k),
    )
    oracle = make_oracle(model, make_plan(decode=(1,)))
    squares = query_squares(oracle, text(2, 16))
    assert not any(module._forward_hooks for module in model.modules())
    by_layer = [torch.cat(seen[2 * at : 2 * at + 2]) for at in range(BLOCKS - 1)]
    for layer, query in enumerate(by_layer):  # behind RoPE, which leaves sums of pairs as they are
        expected = query.square().mean((0, 2)).view(KV_HEADS, HEADS // KV_HEADS, DIM).mean(1)
        torch.testing.assert_close(squares[layer].float(), pair_sums(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen3", "Apertus", "Exaone4"])
def test_as_many_tokens_as_heads_are_not_taken_for_heads(family):
    oracle, ids = make_oracle(tiny(family), make_plan()), text(2, HEADS)
    torch.testing.assert_close(query_squares(oracle, ids), query_squares(oracle, ids[:, :-1]))


def test_a_family_whose_queries_cannot_be_seen_has_no_scales(monkeypatch):
    monkeypatch.setattr("pdtrim_deploy.kvchoice.key_scales.SOURCES", ("no_such_module",))
    oracle = make_oracle(biased(), make_plan())
    assert not query_squares(oracle, text(2, 16)).any()
    offsets = measure(oracle, text(8, 48), silent).offsets
    assert not offsets.file.scaled
    assert offsets.file.layers == tuple(range(BLOCKS))


def test_exponents_are_of_the_fourth_root_and_bounded():
    ones = torch.ones(1, 4, dtype=torch.float64)
    queries = torch.tensor([[2.0**8, 2.0**-8, 2.0**4, 2.0**-4]], dtype=torch.float64)
    assert STEPS == 4
    assert exponents(queries, ones).tolist() == [[8, -8, 4, -4]]
    assert exponents(ones, queries).tolist() == [[-8, 8, -4, 4]]
    assert exponents(7 * queries, 3 * ones).tolist() == [[8, -8, 4, -4]]
    far = exponents(torch.tensor([[1e30, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1e30, 1e30, 1e30]]))
    assert far.tolist() == [[MAX_EXPONENT, -15, -15, -15]]
    for odd in (0.0 * ones, torch.nan * ones):
        assert not exponents(odd, ones).any()
        assert not exponents(ones, odd).any()
