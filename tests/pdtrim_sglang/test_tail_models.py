"""Prompts through two models, divided by us, against SGLang's own chunks of the same: the body's, then the tail's."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
import pdtrim_sglang.kv_only_layers as kv_only_layers
from pdtrim_sglang.kv_only import keep_only_kv
from pdtrim_sglang.patches import loading
from pdtrim_sglang.prompt_tail.body import load_body, share_equal
from pdtrim_sglang.prompt_tail.tails import PromptTails
from pdtrim_sglang.sublayers import ZeroAttention, ZeroMLP
from tailmodels import DIM, FAMILIES, HIDDEN, KV_HEADS, LAYERS, Worker, make_model, one_rank

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, ModelShape, PDPlan, WithoutAttention, WithoutMLP
from pdtrim_deploy.plan.blocks import BODY

TAIL, ALONE = 5, (1, 2)
PROMPTS = {"a": 13, "b": 9, "warm-up": 4}
ROWS = {rid: row for row, rid in enumerate(PROMPTS)}
BODIES = {"a": 8, "b": 4, "warm-up": 4}  # nobody knows the warm-up's length: it has no tail
CHUNKS = {  # by batch, of each request: where it begins and how many tokens it has
    "at once": [{"a": (0, 13), "b": (0, 9), "warm-up": (0, 4)}],
    "in chunks": [{"a": (0, 6)}, {"a": (6, 4), "b": (0, 2)}, {"warm-up": (0, 4), "a": (10, 3), "b": (2, 7)}],
    "tails alone": [{"b": (0, 4), "a": (0, 8)}, {"a": (8, 5), "b": (4, 5)}, {"warm-up": (0, 4)}],
    "a tail in two": [{"a": (0, 11), "b": (0, 6)}, {"a": (11, 2), "warm-up": (0, 4)}, {"b": (6, 3)}],
}


@pytest.fixture(scope="module", autouse=True)
def _sglang():
    with one_rank():
        yield


@pytest.fixture
def models(monkeypatch):
    """By family, a model and that of its prompts' bodies: other weights behind the first layer, two layers cut."""

    def make(family):
        torch.manual_seed(0)
        whole, body = make_model(family, monkeypatch), make_model(family, monkeypatch)
        body.embed_tokens, body.norm = whole.embed_tokens, whole.norm
        body.layers[0].load_state_dict(whole.layers[0].state_dict())
        for index in ALONE:
            keep_only_kv(body.layers[index], HIDDEN)
        return whole, body

    return make


def tails_of(body):
    """The prompts of `a` and `b` are known."""
    tails = PromptTails(TAIL, body)
    for room, rid in enumerate(("a", "b")):
        tails.expect(rid, room, PROMPTS[rid])
    return tails


def expected_of(whole, body):
    """Each prompt by itself: hidden states, and the worker whose pool has the rows."""
    worker, states = Worker(whole), {}
    for rid, tokens in PROMPTS.items():
        before = BODIES[rid]
        states[rid] = worker.run([(rid, ROWS[rid], 0, before)], body)
        if tokens > before:
            tail = worker.run([(rid, ROWS[rid], before, tokens - before)])
            states[rid] = torch.cat((states[rid], tail))
    return worker, states


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_states_are_those_of_sglangs_own_chunks(models, family, chunks):
    whole, body = models(family)
    expected, states = expected_of(whole, body)
    worker = Worker(whole, tails_of(body))
    for batch in chunks:
        got = worker.run([(rid, ROWS[rid], *chunk) for rid, chunk in batch.items()])
        rows = torch.cat([states[rid][prefix : prefix + extend] for rid, (prefix, extend) in batch.items()])
        torch.testing.assert_close(got, rows, rtol=1e-4, atol=1e-4)
    for rid, tokens in PROMPTS.items():
        for got, other in zip(worker.rows(ROWS[rid], tokens), expected.rows(ROWS[rid], tokens), strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)


def test_another_division_is_seen(models):
    """What the comparison above would say if the tail were a token longer."""
    whole, body = models("llama")
    _, states = expected_of(whole, body)
    tails = PromptTails(TAIL + 1, body)
    tails.expect("a", 0, PROMPTS["a"])
    got = Worker(whole, tails).run([("a", 0, 0, 13)])
    assert (got - states["a"]).abs().max() > 0.1


def test_embeddings_of_a_client_and_captured_layers_are_divided_too(models):
    """As EAGLE3 has them: hidden states, and a list of those of some layers."""
    whole, body = models("llama")
    whole.layers_to_capture = body.layers_to_capture = [1, 3]
    embeddings = torch.randn(13, HIDDEN)
    worker = Worker(whole)
    first = worker.run([("a", 0, 0, 8)], body, input_embeds=embeddings[:8])
    last = worker.run([("a", 0, 8, 5)], input_embeds=embeddings[8:])
    states, captured = Worker(whole, tails_of(body)).run([("a", 0, 0, 13)], input_embeds=embeddings)
    torch.testing.assert_close(states, torch.cat((first[0], last[0])), rtol=1e-4, atol=1e-4)
    assert len(captured) == 2
    for rows, *parts in zip(captured, first[1], last[1], strict=True):
        torch.testing.assert_close(rows, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_layers_that_sglang_captures_for_a_draft_are_captured_of_both_models(models):
    """SGLang names them to its own model alone, once it is loaded."""
    whole, body = models("qwen3")
    whole.layers_to_capture = [1, 3]
    tails = tails_of(body)
    worker = Worker(whole, tails)
    for tokens in (13, 8):  # a batch of both, and one of a body alone
        states, captured = worker.run([("a", 0, 0, tokens)])
        assert [len(rows) for rows in (states, *captured)] == [tokens] * 3


def test_what_cannot_be_put_together_is_refused(models):
    whole, body = models("llama")
    for model in (whole, body):
        genuine = model.forward
        model.forward = lambda *args, genuine=genuine: SimpleNamespace(states=genuine(*args))
    worker = Worker(whole, tails_of(body))
    with pytest.raises(RuntimeError, match=r"SGLang's model returns SimpleNamespace.*kv_only_tail 0"):
        worker.run([("a", 0, 0, 13)])


def test_a_prompt_that_was_not_prepared_is_refused(models):
    """It would run through one model as a whole."""
    whole, body = models("llama")
    worker = Worker(whole, tails_of(body))
    worker.run([("a", 0, 0, 13)])
    batch = copy.copy(worker.batch)
    with pytest.raises(RuntimeError, match="whose attention it has not prepared"):
        whole.forward(batch.input_ids, batch.positions, batch)


def test_layers_are_complete_when_the_tail_s_model_has_run_them(models):
    """Rows that leave by layer wait for the tail, where a batch has one."""
    whole, body = models("llama")
    tails, seen = tails_of(body), []
    worker = Worker(whole, tails)
    attend = worker.backend.forward

    def attended(q, k, v, layer, batch, *args, **kwargs):
        seen.append((layer.layer_id, tails.completes(batch)))
        return attend(q, k, v, layer, batch, *args, **kwargs)

    worker.backend.forward = attended
    worker.run([("a", 0, 0, 13)])
    attending = [index for index in range(LAYERS) if index not in ALONE]
    assert seen == [(index, False) for index in attending] + [(index, True) for index in range(LAYERS)]
    seen.clear()
    worker.run([("b", 1, 0, 4)])
    assert seen == [(index, True) for index in attending]


def test_no_hidden_state_is_held_when_a_batch_has_run(models):
    whole, body = models("llama")
    tails = tails_of(body)
    worker = Worker(whole, tails)
    worker.run([("a", 0, 0, 13)])
    assert all(part.batch.residual_stream is None for part in (tails._parts.body, tails._parts.tail))


def tensors_of(model):
    return [*model.named_parameters(), *model.named_buffers()]


def test_equal_tensors_are_shared_and_no_others(models):
    whole, body = models("qwen2")
    other = copy.deepcopy(body)
    other.embed_tokens.weight.data = whole.embed_tokens.weight.clone()
    before = {name: tensor.clone() for name, tensor in tensors_of(other)}
    freed = share_equal(other, whole)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(whole)}
    shared = {name for name, tensor in tensors_of(other) if tensor.data_ptr() == places.get(name)}
    first = {f"layers.0.{name}" for name, _ in whole.layers[0].named_parameters()}
    assert shared >= {"embed_tokens.weight", "norm.weight"} | first
    assert not any(name.startswith("layers.3.") and "norm" not in name for name in shared)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(other))
    assert freed == sum(before[name].nbytes for name in shared)
    assert share_equal(other, whole) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_tensors_are_compared_by_their_bytes(dtype):
    """Torch compares no FP8; a scale that is no number is equal to itself."""

    def module(*values):
        held = nn.Module()
        held.register_buffer("codes", torch.tensor(values[:-1]).to(dtype))
        held.register_buffer("scale", torch.tensor(values[-1]))
        return held

    tail = module(1.0, 2.0, torch.nan)
    assert share_equal(module(1.0, 2.0, torch.nan), tail) == tail.codes.nbytes + tail.scale.nbytes
    assert share_equal(module(1.0, 3.0, torch.nan), tail) == tail.scale.nbytes
    assert share_equal(module(1.0, 2.0, 2.0, 1.0), tail) == 0


class CausalLM(nn.Module):
    """As far as the plugin knows one of SGLang's."""

    config = SimpleNamespace(hidden_size=HIDDEN)

    def __init__(self, model):
        super().__init__()
        self.model = model


def plan_of(tail=TAIL, first=None):
    """`first`: what both stages do with the first block."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, kv_dtype="float32"
    )
    prefill = tuple(KVOnly() if block in ALONE else Keep() for block in range(LAYERS))
    decode, sends = (Keep(),) * LAYERS, LAYERS
    if first is not None:
        prefill, decode = (first, *prefill[1:]), (first, *decode[1:])
        sends -= isinstance(first, WithoutAttention)
    return PDPlan(model=shape, prefill=prefill, decode=decode, kv=(KVSend(),) * sends, kv_only_tail=tail)


def runner_of(model, folder, plan):
    (folder / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    return SimpleNamespace(
        model=CausalLM(model), startup_weight_load=None,
        server_args=SimpleNamespace(
            disaggregation_mode="prefill", pp_size=1, kv_cache_dtype="auto", cpu_offload_gb=0, offload_group_size=-1,
            weight_cache_mode="off", model_checksum=None, load_format="auto",
        ),
        model_config=SimpleNamespace(model_path=str(folder)), load_config="as the worker's", device="cpu", gpu_id=0,
        memory_saver_adapter="saver",
    )  # fmt: skip


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A runner whose model is loaded, and the body's model, whose checkpoint is there."""

    def make(plan):
        whole, body = (make_model("llama", monkeypatch) for _ in range(2))
        (tmp_path / BODY).mkdir()
        (tmp_path / BODY / "config.json").write_text("{}")
        monkeypatch.setattr(kv_only_layers, "load_body", lambda _: CausalLM(body))
        return runner_of(whole, tmp_path, plan), whole, body

    return make


@pytest.mark.parametrize("first", [WithoutAttention(), WithoutMLP()])
def test_both_models_go_without_what_the_plan_leaves_out(loaded, first):
    """Attentions that are left write to the same layers of the pool, which has none for one that is not there."""
    runner, whole, body = loaded(plan_of(first=first))
    loading.cut_planned_layers(None, runner)
    for layer in (whole.layers[0], body.layers[0]):
        assert isinstance(layer.self_attn, ZeroAttention) is isinstance(first, WithoutAttention)
        assert isinstance(layer.mlp, ZeroMLP) is isinstance(first, WithoutMLP)
    left = [layer for layer in range(LAYERS) if layer or isinstance(first, WithoutMLP)]
    for model in (whole, body):
        assert [model.layers[at].self_attn.attn.layer_id for at in left] == list(range(len(left)))


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("cpu_offload_gb", 1, "--cpu-offload-gb"),
        ("offload_group_size", 4, "--offload-group-size"),
        ("weight_cache_mode", "client", "--weight-cache-mode"),
        ("model_checksum", "", "--model-checksum"),
        ("load_format", "remote_instance", "--load-format remote_instance"),
    ],
)
def test_options_on_one_model_s_weights_are_refused_before_the_second_is_loaded(
    loaded, monkeypatch, field, value, option
):
    runner, _, _ = loaded(plan_of())
    monkeypatch.setattr(kv_only_layers, "load_body", lambda _: pytest.fail("it was loaded"))
    setattr(runner.server_args, field, value)
    with pytest.raises(RuntimeError, match=f"last {TAIL} prompt tokens through another model.* without {option}$"):
        loading.cut_planned_layers(None, runner)


@pytest.mark.parametrize("tail", [TAIL, 0])
def test_new_weights_are_refused_by_sglang_where_there_are_two_models(loaded, tail):
    """They would reach the model of the tails, and tensors that both share."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    runner, _, _ = loaded(plan_of(tail))
    loading.cut_planned_layers(None, runner)
    refusal = weight_updater._unsupported_derived_weight_cache_error(runner.model)
    assert (refusal or "").startswith("pdtrim: new weights would reach one of the two models") is bool(tail)


def test_a_prefill_worker_cuts_the_body_s_model_and_none_else(loaded):
    runner, whole, body = loaded(plan_of())
    loading.cut_planned_layers(None, runner)
    cut = [type(layer.self_attn.o_proj).__name__ == "ZeroProjection" for layer in body.layers]
    assert cut == [index in ALONE for index in range(LAYERS)]
    assert not any(type(layer.self_attn.o_proj).__name__ == "ZeroProjection" for layer in whole.layers)
    expected = expected_of(whole, body)[1]["a"]
    runner.pdtrim_tails.expect("a", 0, 13)
    got = Worker(whole, runner.pdtrim_tails).run([("a", 0, 0, 13)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_body_is_loaded_as_sglang_loads_the_model_beside_it(monkeypatch, tmp_path):
    from sglang.srt.model_executor.model_runner_components import load_model_utils

    calls = []
    monkeypatch.setattr(
        load_model_utils,
        "load_model_with_memory_saver",
        lambda **arguments: calls.append(arguments) or SimpleNamespace(model=7),
    )
    monkeypatch.setattr(load_model_utils, "load_kv_cache_scales", lambda **arguments: calls.append(arguments))
    runner = runner_of(None, tmp_path, plan_of())
    assert load_body(runner) == 7
    loaded, scales = calls
    assert loaded.pop("model_config").model_path == str(tmp_path / BODY)
    assert runner.model_config.model_path == str(tmp_path)
    assert loaded == {
        "load_config": "as the worker's", "device": "cpu", "gpu_id": 0, "memory_saver_adapter": "saver",
        "is_draft_worker": False,
    }  # fmt: skip
    assert scales == {"model": 7, "kv_cache_dtype": "auto"}


def test_a_worker_without_the_body_s_folder_says_so(models, monkeypatch, tmp_path):
    from pdtrim_deploy.errors import UserError

    runner = runner_of(make_model("llama", monkeypatch), tmp_path, plan_of())
    with pytest.raises(UserError, match=f"{tmp_path}/{BODY}: missing.*copy it from the bundle that the plan is of"):
        loading.cut_planned_layers(None, runner)
