"""Prompts whose last layers we divide, against SGLang's own chunks of two models: the body's, then the tail's."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.kv_only import keep_only_kv
from pdtrim_sglang.patches import loading
from pdtrim_sglang.prompt_tail import body as body_module
from pdtrim_sglang.prompt_tail.tails import PromptTails
from pdtrim_sglang.sublayers import ZeroAttention, ZeroMLP
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from tailmodels import DIM, FAMILIES, HIDDEN, KV_HEADS, LAYERS, Worker, make_model, one_rank

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, ModelShape, PDPlan, WithoutAttention, WithoutMLP
from pdtrim_deploy.plan.blocks import BODY

TAIL, ALONE = 5, (2, 3)
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
    """By family, a model and that of its prompts' bodies: its last two layers have other weights, and are cut."""

    def make(family):
        torch.manual_seed(0)
        whole, body = make_model(family, monkeypatch), make_model(family, monkeypatch)
        body.embed_tokens, body.norm = whole.embed_tokens, whole.norm
        for layer, other in zip(body.layers[: ALONE[0]], whole.layers, strict=False):
            layer.load_state_dict(other.state_dict())
        for index in ALONE:
            keep_only_kv(body.layers[index], HIDDEN)
        return whole, body

    return make


def tails_of(body):
    """The prompts of `a` and `b` are known."""
    tails = PromptTails(TAIL, ALONE[0], body.layers[ALONE[0] :])
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
    tails = PromptTails(TAIL + 1, ALONE[0], body.layers[ALONE[0] :])
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


@pytest.mark.parametrize("captured", [[1, 3], [2, 3]])
def test_layers_that_sglang_captures_for_a_draft_are_captured_of_all_rows(models, captured):
    """SGLang names them to its own model once it is loaded; also of batches of one kind."""
    whole, body = models("qwen3")
    expected = Worker(whole)
    whole.layers_to_capture = body.layers_to_capture = captured
    first, last = (
        expected.run([("a", 0, 0, 8)], body)[1],
        expected.run([("a", 0, 8, 5)])[1],
    )
    worker = Worker(whole, tails_of(body))
    for start, stop in ((0, 13), (0, 8), (8, 13)):
        _, got = worker.run([("a", 0, start, stop - start)])
        for rows, *parts in zip(got, first, last, strict=True):
            torch.testing.assert_close(rows, torch.cat(parts)[start:stop], rtol=1e-4, atol=1e-4)


def test_a_draft_that_reads_between_layers_which_nobody_asks_is_refused(models):
    """Granite's layers take no one to give what they read to."""
    whole, body = models("granite")
    whole.layers_to_capture = [1, 3]
    with pytest.raises(RuntimeError, match=r"reads what layer 3 reads.*kv_only_tail 0"):
        Worker(whole, tails_of(body))


def test_a_prompt_that_was_not_prepared_is_refused(models):
    """It would run through one model as a whole."""
    whole, body = models("llama")
    worker = Worker(whole, tails_of(body))
    worker.run([("a", 0, 0, 13)])
    batch = copy.copy(worker.batch)
    context = ForwardContext(attn_backend=worker.backend)
    with forward_context(context, forward_batch=batch), pytest.raises(RuntimeError, match="it has not prepared"):
        whole.forward(batch.input_ids, batch.positions, batch)


def test_layers_attend_in_order_and_tails_alone_behind_the_first_that_is_divided(models):
    """So that rows which leave by layer are there: those of bodies since the first of these."""
    whole, body = models("llama")
    seen, worker = [], Worker(whole, tails_of(body))
    attend = worker.backend.forward

    def attended(q, k, v, layer, batch, *args, **kwargs):
        seen.append((layer.layer_id, len(q)))
        return attend(q, k, v, layer, batch, *args, **kwargs)

    worker.backend.forward = attended
    worker.run([("a", 0, 0, 13)])
    assert seen == [(0, 13), (1, 13), (2, 5), (3, 5)]
    seen.clear()
    worker.run([("b", 1, 0, 4)])
    assert seen == [(0, 4), (1, 4)]


def test_no_hidden_state_is_held_when_a_batch_has_run(models):
    whole, body = models("llama")
    tails = tails_of(body)
    worker = Worker(whole, tails)
    worker.run([("a", 0, 0, 13)])
    assert all(part.batch.residual_stream is None for part in tails._division.parts)
    assert whole.layers[-1].forward.func.__self__._body is None


class CausalLM(nn.Module):
    """As far as the plugin knows one of SGLang's."""

    config = SimpleNamespace(hidden_size=HIDDEN)

    def __init__(self, model):
        super().__init__()
        self.model = model


def plan_of(tail=TAIL, first=None):
    """The last two blocks are KV-only; `first`: what both stages do with the first block."""
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
        model_config=SimpleNamespace(model_path=str(folder), dtype=torch.float32), load_config="as the worker's",
        device="cpu", gpu_id=0, memory_saver_adapter="saver",
    )  # fmt: skip


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A runner whose model is loaded, and layers of the body's checkpoint, which are two."""

    def make(plan):
        whole, body = (make_model("llama", monkeypatch) for _ in range(2))
        body.layers = body.layers[ALONE[0] :]
        for number, layer in enumerate(body.layers):
            layer.self_attn.attn.layer_id = number  # as in a model of two layers
        (tmp_path / BODY).mkdir()
        (tmp_path / BODY / "config.json").write_text(json.dumps({"num_hidden_layers": len(ALONE)}))
        monkeypatch.setattr(body_module, "_load", lambda _: CausalLM(body))
        return runner_of(whole, tmp_path, plan), whole, body

    return make


@pytest.mark.parametrize("first", [WithoutAttention(), WithoutMLP()])
def test_bodies_write_where_layers_do_that_stand_behind_sublayers_left_out(loaded, first):
    """Attentions that are left have the pool's layers, which has none for one that is not there."""
    runner, whole, body = loaded(plan_of(first=first))
    loading.cut_planned_layers(None, runner)
    assert isinstance(whole.layers[0].self_attn, ZeroAttention) is isinstance(first, WithoutAttention)
    assert isinstance(whole.layers[0].mlp, ZeroMLP) is isinstance(first, WithoutMLP)
    lost = isinstance(first, WithoutAttention)
    assert [layer.self_attn.attn.layer_id for layer in body.layers] == [index - lost for index in ALONE]


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
def test_options_on_one_model_s_weights_are_refused_before_others_are_loaded(loaded, monkeypatch, field, value, option):
    runner, _, _ = loaded(plan_of())
    monkeypatch.setattr(body_module, "_load", lambda _: pytest.fail("it was loaded"))
    setattr(runner.server_args, field, value)
    with pytest.raises(RuntimeError, match=f"last {TAIL} prompt tokens through another model.* without {option}$"):
        loading.cut_planned_layers(None, runner)


@pytest.mark.parametrize("tail", [TAIL, 0])
def test_new_weights_are_refused_by_sglang_where_bodies_have_others(loaded, tail):
    """They would reach the model of the tails alone."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    runner, _, _ = loaded(plan_of(tail))
    loading.cut_planned_layers(None, runner)
    refusal = weight_updater._unsupported_derived_weight_cache_error(runner.model)
    assert (refusal or "").startswith("pdtrim: new weights would not reach the layers") is bool(tail)


def test_a_prefill_worker_keeps_what_makes_k_and_v_of_the_body_s_checkpoint(loaded):
    runner, whole, body = loaded(plan_of())
    reference = copy.deepcopy(whole)
    for index, layer in zip(ALONE, body.layers, strict=True):
        reference.layers[index] = copy.deepcopy(layer)
        reference.layers[index].self_attn.attn.layer_id = index
        keep_only_kv(reference.layers[index], HIDDEN)
    loading.cut_planned_layers(None, runner)
    assert not any(type(layer.self_attn.o_proj).__name__ == "ZeroProjection" for layer in whole.layers)
    kept = {name.partition(".")[2] for name, parameter in body.named_parameters() if parameter.numel()}
    assert {name.partition(".")[2] for name in kept} == {"input_layernorm.weight", "self_attn.qkv_proj.weight"}
    expected = expected_of(whole, reference)[1]["a"]
    runner.pdtrim_tails.expect("a", 0, 13)
    got = Worker(whole, runner.pdtrim_tails).run([("a", 0, 0, 13)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_body_is_loaded_as_sglang_loads_the_model_beside_it(monkeypatch, tmp_path, device):
    """On a CPU with sizes padded to what ranks divide, as those of the model (ModelRunner.load_model)."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import load_model_utils

    calls = []
    monkeypatch.setattr(
        load_model_utils,
        "load_model_with_memory_saver",
        lambda **arguments: calls.append(arguments) or SimpleNamespace(model=7),
    )
    monkeypatch.setattr(
        ModelConfig, "from_server_args", lambda args, model_path: SimpleNamespace(args=args, path=model_path)
    )
    monkeypatch.setattr(
        model_runner,
        "adjust_config_with_unaligned_cpu_tp",
        lambda config, load_config, ranks: SimpleNamespace(**vars(config), padded=(load_config, ranks)),
    )
    runner = runner_of(None, tmp_path, plan_of())
    runner.device = device
    assert body_module._load(runner) == 7
    (arguments,) = calls
    config = arguments.pop("model_config")
    padded = {"padded": ("as the worker's", 1)} if device == "cpu" else {}
    assert vars(config) == {"args": runner.server_args, "path": str(tmp_path / BODY), "dtype": torch.float32} | padded
    assert arguments == {
        "load_config": "as the worker's", "device": device, "gpu_id": 0, "memory_saver_adapter": "saver",
        "is_draft_worker": False,
    }  # fmt: skip


def test_a_worker_without_the_body_s_folder_says_so(models, monkeypatch, tmp_path):
    from pdtrim_deploy.errors import UserError

    runner = runner_of(make_model("llama", monkeypatch), tmp_path, plan_of())
    with pytest.raises(UserError, match=f"{tmp_path}/{BODY}: missing.*copy it from the bundle that the plan is of"):
        loading.cut_planned_layers(None, runner)
