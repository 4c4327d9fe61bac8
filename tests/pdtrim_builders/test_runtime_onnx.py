"""The runtime SGLang's executor uses: callback, chunks, decode steps, staging buffers, errors."""

import itertools
import threading

import pytest
import safetensors.torch
import torch
from pdtrim_builders import build_target
from pdtrim_builders.graph.stage import read_stage
from pdtrim_builders.runtime_onnx import OnnxStage

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.models.loading import load_model

pytest.importorskip("onnxruntime_extensions")
HEADS, KV_HEADS, DIM = 4, 2, 16


class Pool:
    """One request's KV, as a runtime would keep it: each call appends and attends to all that is there."""

    def __init__(self, layers):
        self.kv = [(torch.empty(0, KV_HEADS, DIM), torch.empty(0, KV_HEADS, DIM)) for _ in range(layers)]

    def __call__(self, layer, q, k, v):
        kv = [torch.cat((old, new.view(-1, KV_HEADS, DIM))) for old, new in zip(self.kv[layer], (k, v), strict=True)]
        self.kv[layer] = tuple(kv)
        keys, values = (x.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in kv)
        q = q.view(-1, HEADS, DIM).transpose(0, 1)
        seen = torch.ones(q.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - q.shape[1])
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return out.transpose(0, 1).reshape(q.shape[1], -1)


@pytest.fixture(scope="module")
def engine(tiny_stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("engine") / "prefill"
    folder = tiny_stages("Qwen3ForCausalLM") / "prefill"
    build_target("onnx", folder, out)
    return folder, out / "model.onnx"


@pytest.fixture(scope="module")
def reference(engine):
    ids = torch.randint(0, 259, (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = load_model(engine[0]).model(ids[None], use_cache=True)
    sides = [[side[0].transpose(0, 1).contiguous() for side in (x.keys, x.values)] for x in out.past_key_values.layers]
    return ids, out.last_hidden_state[0], sides


@pytest.mark.parametrize("cuts", [(0, 40), (0, 17, 40), (0, 1, 38, 39, 40)])
def test_chunks_and_decode_steps(cuts, engine, reference):
    stage, pool = OnnxStage(engine[1], Pool(5)), None
    pool = stage._attention
    ids, hidden, sides = reference
    got = [stage.run(ids[lo:hi], torch.arange(lo, hi)).hidden for lo, hi in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(got), hidden, atol=2e-4, rtol=0)
    for (k, v), (want_k, want_v) in zip(pool.kv, sides, strict=True):
        torch.testing.assert_close(k, want_k, atol=1e-4, rtol=0)
        torch.testing.assert_close(v, want_v, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cuts", [(0, 40), (0, 17, 40), (0, 1, 38, 40)])
def test_packed_rows_land_in_the_staging_buffer(cuts, engine, reference):
    stage, model = OnnxStage(engine[1], Pool(5)), read_stage(engine[0])
    ids, _, sides = reference
    for lo, hi in itertools.pairwise(cuts):
        layout = chunk_layout(model.plan, 40, lo, hi)
        staging = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
        rules, rows, buffers = {rule.decode_layer: rule for rule in model.sends}, {}, {}
        for part in layout.layers:
            rule = rules[part.decode_layer]
            rows[rule.rows_input] = torch.cat([torch.arange(*r) for r in part.ranges])
            buffers[rule.output] = staging[part.offset :][: part.bytes].view(torch.float32)
        stage.run(ids[lo:hi], torch.arange(lo, hi), rows, buffers)
        expected = pack(layout, *zip(*sides, strict=True), torch.arange(lo, hi))
        torch.testing.assert_close(staging.view(torch.float32), expected.view(torch.float32), atol=1e-4, rtol=0)


def test_what_the_callback_raises_comes_out(engine):
    seen = []

    def fail(layer, q, k, v):
        seen.append(layer)
        raise KeyError("no such pool")

    stage = OnnxStage(engine[1], fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="no such pool"):
            stage.run(torch.arange(3), torch.arange(3))
    assert seen == [0, 0]  # the layers after it are not asked


def test_sessions_do_not_mix_callbacks(engine, reference):
    ids, hidden, _ = reference
    results = {}

    def work(name, length):
        stage = OnnxStage(engine[1], Pool(5))
        results[name] = torch.cat([stage.run(ids[t : t + 1], torch.tensor([t])).hidden for t in range(length)])

    threads = [threading.Thread(target=work, args=(n, length)) for n, length in enumerate((30, 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, length in enumerate((30, 20)):
        torch.testing.assert_close(results[name], hidden[:length], atol=2e-4, rtol=0)


def test_body_and_callback_agree(engine, reference):
    ids, hidden, _ = reference
    torch.testing.assert_close(OnnxStage(engine[1]).run(ids, torch.arange(40)).hidden, hidden, atol=2e-4, rtol=0)


def test_a_shared_embedding_is_read_in_place(engine, reference):
    ids, hidden, _ = reference
    name, tensors = "model.embed_tokens.weight", safetensors.torch.load_file(engine[0] / "model.safetensors")
    stage = OnnxStage(engine[1], Pool(5), shared={"embed_tokens": tensors[name]})
    torch.testing.assert_close(stage.run(ids, torch.arange(40)).hidden, hidden, atol=2e-4, rtol=0)
    tensors[name][ids[-1]] += 1
    stage._attention.__init__(5)
    assert (stage.run(ids, torch.arange(40)).hidden[-1] - hidden[-1]).abs().max() > 1e-2


def test_the_profile_has_a_time_for_every_node(engine, tmp_path):
    stage = OnnxStage(engine[1], Pool(5), profile=tmp_path / "profile")
    for token in range(3):
        stage.run(torch.tensor([token]), torch.tensor([token]))
    times = stage.node_times()
    assert len(times["PagedAttention"]) == 3 * 5
    assert all(seconds >= 0 for measured in times.values() for seconds in measured)


@pytest.mark.parametrize("cuts", [(0, 40), (0, 17, 40)])
def test_a_layer_for_its_kv_alone_asks_to_write(cuts, tiny_dir, make_stages, tmp_path):
    make_stages(tiny_dir("Qwen3ForCausalLM"), tmp_path, alone=4)
    build_target("onnx", tmp_path / "prefill", tmp_path / "engine")
    pool, written = Pool(5), []

    def runtime(layer, q, k, v):
        if layer != 3:
            return pool(layer, q, k, v)
        written.append((k, v))
        return q

    stage, ids = OnnxStage(tmp_path / "engine" / "model.onnx", runtime), torch.arange(20, 60)
    got = [stage.run(ids[lo:hi], torch.arange(lo, hi)).hidden for lo, hi in itertools.pairwise(cuts)]
    with torch.no_grad():
        out = load_model(tmp_path / "prefill").model(ids[None], use_cache=True)
    torch.testing.assert_close(torch.cat(got), out.last_hidden_state[0], atol=2e-4, rtol=0)
    expected = out.past_key_values.layers[3]
    for parts, side in zip(zip(*written, strict=True), (expected.keys, expected.values), strict=True):
        torch.testing.assert_close(torch.cat(parts).view(-1, KV_HEADS, DIM), side[0].transpose(0, 1), atol=1e-4, rtol=0)


def test_float16_has_no_callback(tiny_stages, tmp_path):
    build_target("onnx", tiny_stages("LlamaForCausalLM") / "decode", tmp_path / "e", {"dtype": "float16"})
    with pytest.raises(UserError, match="a Python callback works on float32 only"):
        OnnxStage(tmp_path / "e" / "model.onnx", Pool(4))


def test_not_a_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="onnxruntime cannot load this graph"):
        OnnxStage(tmp_path / "model.onnx")


def test_a_buffer_of_another_size(engine):
    stage = OnnxStage(engine[1], Pool(5))
    with pytest.raises(ValueError, match="the buffer of kv_send_0"):
        stage.run(torch.arange(3), torch.arange(3), {}, {"kv_send_0": torch.empty(7)})
