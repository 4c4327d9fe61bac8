"""KV-only layers with a tail: SGLang's own layers, pool and attention, against the same written down plainly."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.patches import loading
from pdtrim_sglang.prompt_tail.layer import SecondProjections, TailedLayer
from pdtrim_sglang.prompt_tail.tails import PromptTails
from plainlayers import DIM, HEADS, HIDDEN, KV_HEADS, Texts
from taillayers import Worker, make_layers, make_second, one_rank, ranks

from pdtrim_deploy.models.block_tensors import save_blocks
from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY

TAIL, ALONE = 5, (1, 2)
PROMPTS = {"a": 13, "b": 9, "warm-up": 4}
ROWS = {rid: row for row, rid in enumerate(PROMPTS)}
CHUNKS = {  # by batch, of each request: where it begins and how many tokens it has
    "at once": [{"a": (0, 13), "b": (0, 9), "warm-up": (0, 4)}],
    "in chunks": [{"a": (0, 6)}, {"a": (6, 4), "b": (0, 2)}, {"warm-up": (0, 4), "a": (10, 3), "b": (2, 7)}],
    "tails alone": [{"b": (0, 4), "a": (0, 8)}, {"a": (8, 5), "b": (4, 5)}, {"warm-up": (0, 4)}],
}


@pytest.fixture(scope="module", autouse=True)
def _sglang():
    with one_rank():
        yield


def tailed(layers, seconds):
    """These layers of them with a tail; the prompts of `a` and `b` are known."""
    tails = PromptTails(TAIL)
    for room, rid in enumerate(("a", "b")):
        tails.expect(rid, room, PROMPTS[rid])
    for index, second in seconds.items():
        layers[index].forward = TailedLayer(layers[index], second, tails)
    return tails


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("family", "biases"), [("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", False)])
def test_all_rows_are_those_of_whole_prompts(family, biases, chunks, monkeypatch):
    """Hidden states, K and V of each layer, however the prompts were divided."""
    torch.manual_seed(0)
    layers = make_layers(family, monkeypatch)
    seconds = {index: make_second(family, biases) for index in ALONE}
    embedded = {rid: torch.randn(tokens, HIDDEN) for rid, tokens in PROMPTS.items()}
    expected = Texts(layers, seconds, embedded, {"a": TAIL, "b": TAIL, "warm-up": 0})
    worker = Worker(layers, tailed(layers, seconds))
    for batch in chunks:
        parts = [(rid, ROWS[rid], *chunk) for rid, chunk in batch.items()]
        spans = [(rid, slice(prefix, prefix + extend)) for rid, _, prefix, extend in parts]
        before = torch.cat([embedded[rid][span] for rid, span in spans])
        for index, after in enumerate(worker.run(parts, before.clone())):
            rows = torch.cat([expected.states[rid][index][span] for rid, span in spans])
            torch.testing.assert_close(after, rows, rtol=1e-4, atol=1e-4)
            if index in ALONE:
                begins = {rid: PROMPTS[rid] - (0 if rid == "warm-up" else TAIL) for rid in PROMPTS}
                passing = torch.cat([torch.arange(span.start, span.stop) < begins[rid] for rid, span in spans])
                assert torch.equal(after[passing], before[passing]), "a row outside of the tail has changed"
            before = after
    for rid, tokens in PROMPTS.items():
        for index, (keys, values) in enumerate(zip(*worker.rows(ROWS[rid], tokens), strict=True)):
            torch.testing.assert_close(keys, expected.keys[rid][index], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values, expected.values[rid][index], rtol=1e-4, atol=1e-4)


def test_a_tail_holds_no_hidden_states_when_its_layers_have_run(monkeypatch):
    """Its batch is held until the next one comes."""
    layers = make_layers("llama", monkeypatch)
    tails = tailed(layers, {1: make_second("llama")})
    worker = Worker(layers, tails)
    worker.run([("a", 0, 0, 13)], torch.randn(13, HIDDEN))
    assert tails.of(worker.batch).batch.residual_stream is None


def test_the_plain_layers_are_sglangs(monkeypatch):
    """What the other tests compare with, where no layer has a tail."""
    torch.manual_seed(1)
    for family in ("llama", "qwen2", "qwen3"):
        layers, x = make_layers(family, monkeypatch), torch.randn(9, HIDDEN)
        states = Worker(layers).run([("b", 0, 0, 9)], x.clone())
        expected = Texts(layers, {}, {"b": x}, {"b": 0}).states["b"]
        for after, rows in zip(states, expected, strict=True):
            torch.testing.assert_close(after, rows, rtol=1e-4, atol=1e-4)


def test_the_model_still_has_its_own_tensors_and_no_others(monkeypatch):
    """What SGLang counts, saves and updates: second tensors are no part of the module."""
    layers = make_layers("qwen3", monkeypatch)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in layers[1].named_parameters()}
    tailed(layers, {1: make_second("qwen3")})
    after = dict(layers[1].named_parameters())
    assert {name: id(tensor) for name, tensor in after.items()} == {name: place for name, (place, _) in before.items()}
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())


def test_a_prefill_worker_reads_the_second_tensors_beside_its_checkpoint(monkeypatch, tmp_path):
    """Of the plan's blocks, which are other numbers than the stage's layers where blocks before them are dropped."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=5, num_kv_heads=KV_HEADS, head_dim=DIM, kv_dtype="float32"
    )
    stages = {"prefill": (Drop(), Keep(), Keep(), KVOnly(), Keep()), "decode": (Drop(), *[Keep()] * 4)}
    plan = PDPlan(model=shape, kv=(KVSend(),) * 4, **stages).with_parts(kv_only_tail=TAIL)
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    layers, second, x = make_layers("llama", monkeypatch), make_second("llama"), torch.randn(13, HIDDEN)
    runner = SimpleNamespace(
        model=SimpleNamespace(model=SimpleNamespace(layers=layers)), startup_weight_load=None,
        server_args=SimpleNamespace(disaggregation_mode="prefill", pp_size=1),
        model_config=SimpleNamespace(model_path=str(tmp_path)),
    )  # fmt: skip
    save_blocks({3: second}, tmp_path / KV_ONLY)
    loading.cut_planned_layers(None, runner)
    assert [isinstance(layer.forward, TailedLayer) for layer in layers] == [False, False, True, False]
    runner.pdtrim_tails.expect("a", 1, 13)
    states = Worker(layers, runner.pdtrim_tails).run([("a", 0, 0, 13)], x.clone())
    expected = Texts(layers, {2: second}, {"a": x}, {"a": TAIL}).states["a"]
    torch.testing.assert_close(states[-1], expected[-1], rtol=1e-4, atol=1e-4)


def test_layers_of_other_models_are_refused_when_they_are_loaded():
    from sglang.srt.models.granite import GraniteDecoderLayer

    layer = object.__new__(GraniteDecoderLayer)
    with pytest.raises(RuntimeError, match=r"LlamaDecoderLayer, .* has GraniteDecoderLayer: .*kv_only_tail 0"):
        TailedLayer(layer, {}, PromptTails(TAIL))


@pytest.mark.parametrize("chosen", ["forward_native", None])
def test_a_norm_whose_method_is_chosen_already_takes_the_second_weight(monkeypatch, chosen):
    """SGLang keeps the chosen method bound to the norm that chose it."""
    layers = make_layers("llama", monkeypatch)
    norm, second, x = layers[0].input_layernorm, make_second("llama"), torch.randn(3, HIDDEN)
    if chosen is None:
        norm(x)
    else:
        norm._forward_method = getattr(norm, chosen)
    tail = TailedLayer(layers[0], second, PromptTails(TAIL))
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    torch.testing.assert_close(tail._norm(x), expected * second["input_layernorm.weight"])
    torch.testing.assert_close(norm(x), expected * norm.weight)


@pytest.mark.parametrize("everything", [True, False])
def test_sglang_captures_what_goes_into_the_layer(monkeypatch, everything):
    """As EAGLE3 and `return_hidden_states` of some layers have it."""
    layers, captured = make_layers("llama", monkeypatch), []
    tails = tailed(layers, {0: make_second("llama")})
    worker, x = Worker(layers[:1], tails), torch.randn(13, HIDDEN)
    prefix = 8 if everything else 0
    genuine = layers[0].forward
    layers[0].forward = lambda *args: genuine(*args, capture_output=lambda rows: captured.append(rows.clone()))
    worker.run([("a", 0, prefix, 13 - prefix)], x[prefix:].clone())
    assert len(captured) == 1
    assert torch.equal(captured[0], x[prefix:])


@pytest.mark.parametrize("biased", ["none", "model's", "second"])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 1), (4, 2), (8, 5)])
def test_a_rank_has_the_rows_that_sglang_would_load_of_them(monkeypatch, size, rank, biased):
    """KV heads divided among ranks, and copied where there are more ranks than heads."""
    from sglang.srt.layers.linear import QKVParallelLinear

    torch.manual_seed(2)
    heads = max(HEADS, size)
    full = {side: torch.randn(KV_HEADS * DIM, HIDDEN) for side in "kv"}
    model_bias, second_bias = ({side: torch.randn(KV_HEADS * DIM) for side in "kv"} for _ in range(2))
    with ranks(monkeypatch, rank, size):
        qkv, loaded = (QKVParallelLinear(HIDDEN, DIM, heads, KV_HEADS, bias=biased != "none") for _ in range(2))
    for side in "kv":
        loaded.weight.weight_loader(loaded.weight, full[side], side)
        if biased != "none":
            qkv.bias.weight_loader(qkv.bias, model_bias[side], side)
            bias = second_bias if biased == "second" else model_bias
            loaded.bias.weight_loader(loaded.bias, bias[side], side)
    second = {f"self_attn.{side}_proj.weight": full[side] for side in "kv"}
    if biased == "second":
        second |= {f"self_attn.{side}_proj.bias": second_bias[side] for side in "kv"}
    sizes = {"q_size": qkv.q_proj_shard_size, "kv_size": qkv.kv_proj_shard_size}
    projections = SecondProjections(SimpleNamespace(qkv_proj=qkv, **sizes), second)
    x = torch.randn(3, HIDDEN)
    rows, bias = projections(x)
    assert bias is None
    kept = slice(qkv.q_proj_shard_size, None)
    kept_bias = None if biased == "none" else loaded.bias[kept]
    assert torch.equal(rows[:, kept], nn.functional.linear(x, loaded.weight[kept], kept_bias))
    assert torch.equal(rows[:, : kept.start], torch.zeros(3, kept.start))


def test_second_projections_compute_in_the_models_dtype(monkeypatch):
    """SGLang's `--dtype` may be another than the checkpoint's, whose tensors it converts when it loads them."""
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16):
        layer = make_layers("qwen2", monkeypatch)[0]
    second = {name: tensor.float() for name, tensor in make_second("qwen2").items()}
    rows, _ = SecondProjections(layer.self_attn, second)(torch.randn(3, HIDDEN, dtype=torch.bfloat16))
    assert rows.dtype == torch.bfloat16
