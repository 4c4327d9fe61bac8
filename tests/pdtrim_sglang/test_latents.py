"""SGLang's pool of latents (MLATokenToKVPool): what DeepSeek's attention writes there, and how rows of it travel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeoptions import DECODE
from pdtrim_sglang.draft import DraftRows
from pdtrim_sglang.packing import Chunk, Packer
from pdtrim_sglang.plan_source import check_fits, check_padding, dense_plan
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.requirements import check_draft_ranks, check_options
from pdtrim_sglang.rooms import AuxRows
from rankpairs import AUX, PAGE, SLOTS, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import unpack
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.families import LATENT
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

LAYERS, SIZE, ROPE = 3, 64, 16
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=LAYERS, num_kv_heads=1, head_dim=SIZE, rope_dim=ROPE,
    kv_dtype="float32",
)  # fmt: skip
DENSE = PDPlan.dense(SHAPE)


def latent_pool(dtype=torch.float32, slots=SLOTS - PAGE, kind=None, **options):
    from sglang.srt.mem_cache import memory_pool

    pool_class = getattr(memory_pool, kind or "MLATokenToKVPool")
    return pool_class(
        slots, PAGE, dtype=dtype, kv_lora_rank=SIZE, qk_rope_head_dim=ROPE, layer_num=LAYERS, device="cpu",
        enable_memory_saver=False, **options,
    )  # fmt: skip


def fill(pool, slots, seed=0):
    """What attention does: rows `[tokens, 1, latent + rope]` of each layer, by SGLang's own method."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(len(slots), 1, SIZE + ROPE, generator=generator) for _ in range(LAYERS)]
    for layer, row in enumerate(rows):
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), slots, row, None)
    return rows


@pytest.fixture(autouse=True)
def no_context_parallelism(monkeypatch):
    from sglang.srt.mem_cache import memory_pool

    parallel = SimpleNamespace(dcp_enabled=False, attn_dcp_size=1)
    monkeypatch.setattr(memory_pool, "get_parallel", lambda: parallel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_view_has_the_rows_that_sglang_wrote_and_writes_what_it_reads(dtype):
    pool, slots = latent_pool(dtype), torch.tensor([9, 4, 5])
    rows, view = fill(pool, slots), PoolView.of(pool)
    assert (view.latents, view.kv_heads, view.heads, view.tokens) == (True, 1, range(1), SLOTS)
    for layer, row in enumerate(rows):
        assert torch.equal(view.values[layer][slots].flatten(1).float(), row[:, 0, :SIZE].to(dtype).float())
        assert torch.equal(view.keys[layer][slots].flatten(1).float(), row[:, 0, SIZE:].to(dtype).float())
    view.keys[1][4], view.values[1][4] = torch.ones(()).to(dtype), torch.full((), 2.0).to(dtype)
    key, value = pool.get_kv_buffer(1)
    assert key[4, 0].float().tolist() == [2.0] * SIZE + [1.0] * ROPE
    assert value[4, 0].float().tolist() == [2.0] * SIZE


@pytest.mark.parametrize("wire", ["native", "int8", "int4", "int3"])
@pytest.mark.parametrize("chunk", [8, 64])
def test_rows_go_from_one_pool_to_another(wire, chunk):
    """Genuine pools; slots differ, pages are of several tokens, and chunks are cut anywhere."""
    plan = DENSE.with_kv((KVSend(wire_dtype=wire),) * LAYERS)
    source, target = latent_pool(), latent_pool()
    pages, others = torch.tensor([3, 7, 1, 9, 5, 2]), torch.tensor([8, 1, 2, 10, 4, 6])
    views = PoolView.of(source), PoolView.of(target)
    prefill, decode = views[0].slots(pages, TOKENS), views[1].slots(others, TOKENS)
    rows = fill(source, prefill)
    slot = torch.zeros(1 << 15, dtype=torch.uint8)
    packer = Packer(plan, views[0], AuxRows((), ()), [slot])
    for start in range(0, TOKENS, chunk):
        stop = min(TOKENS, start + chunk)
        part = pages[start // PAGE : -(-stop // PAGE)].int().numpy()
        packed = packer.pack(0.0, Chunk(1, part, start, TOKENS, start, stop, False, 0), 0)
        layout = chunk_layout(plan, TOKENS, start, stop)
        assert packed.payload_bytes == layout.total_bytes
        places = views[1].destinations(decode[start:stop])
        unpack(layout, slot[: layout.total_bytes], views[1].keys, views[1].values, places.slots)
    for layer, row in enumerate(rows):
        got = target.get_key_buffer(layer)
        apart = (got[decode] - row).norm() / row.norm()
        assert apart == 0 if wire == "native" else 0 < apart < {"int8": 0.01, "int4": 0.15, "int3": 0.25}[wire]
        assert not got[~torch.isin(torch.arange(SLOTS), decode)].any()


class LatentWorld(World):
    """As rankpairs.World, of genuine pools of latents, the same on every rank."""

    def pool(self, ranks, rank, rows):
        pool = latent_pool()
        if any(side.any() for side in rows[0]):
            fill(pool, torch.arange(SLOTS))
        return PoolView.of(pool)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (4, 1), (1, 4), (4, 2), (2, 4)])
def test_each_rank_of_decode_is_sent_the_latents_once(prefill, decode, monkeypatch):
    plan = DENSE.with_kv((KVSend(), KVSend(wire_dtype="int4"), KVSend(wire_dtype="int8")))
    torch.manual_seed(0)
    world = LatentWorld(monkeypatch, prefill, decode, plan=plan)
    try:
        world.open()
        world.send([0, 12, TOKENS])
        assert set(world.wait(world.prefill + world.decode)) == {KVPoll.Success}, world.decode[0].manager.reasons
        for rank in world.decode:
            assert rank.aux.read(0) == AUX
            slots = rank.pool.slots(world.there.numpy(), TOKENS)
            source = world.prefill[0].pool.slots(world.here.numpy(), TOKENS)
            assert torch.equal(rank.pool.values[0][slots], world.prefill[0].pool.values[0][source])
            assert torch.equal(rank.pool.keys[0][slots], world.prefill[0].pool.keys[0][source])
            assert rank.pool.keys[2][slots].any()
            assert rank.pool.values[1][slots].any()
        sent = [payload for each in world.prefill for payload, _ in each.side.rooms._metrics.successes]
        assert sum(sent) == decode * plan.payload_bytes(TOKENS)
    finally:
        world.close()


def test_a_stock_checkpoint_has_a_plan_of_latents():
    view = PoolView.of(latent_pool(torch.bfloat16))
    plan = dense_plan(LAYERS, view.buffers, 16, latents=True)
    assert (plan.model.num_kv_heads, plan.model.head_dim, plan.model.rope_dim) == (1, SIZE, ROPE)
    check_fits(plan, "decode", view.buffers, 8)
    check_padding(plan, SimpleNamespace(num_key_value_heads=20))
    with pytest.raises(RuntimeError, match=r"expects KV rows of \(2, 8\) .*, the pool has \(2, 32\) in layer 0"):
        check_fits(plan, "decode", view.buffers._replace(k_buffer=view.values), 1)


def test_a_draft_models_latents_travel_as_their_pool_holds_them():
    """An MTP layer has DeepSeek's attention too."""
    source, target = latent_pool(), latent_pool()
    slots = torch.randperm(SLOTS)[:TOKENS]
    rows, layout = fill(source, slots), chunk_layout(DENSE, TOKENS)
    sides = [
        DraftRows.of(pool, view.keys, view.values, SLOTS, latents=True)
        for pool in (source, target)
        for view in [PoolView.of(pool)]
    ]
    assert sides[0].token_bytes == LAYERS * (SIZE + ROPE) * 4
    sides[1].unpack(layout, sides[0].pack(layout, slots), slots)
    assert all(torch.equal(target.get_key_buffer(layer)[slots], row) for layer, row in enumerate(rows))
    plan = PDPlan.dense(SHAPE)
    with pytest.raises(RuntimeError, match="sent from as many ranks as the model has KV heads at most, 1: start"):
        check_draft_ranks(plan, 2)


def test_other_pools_of_latents_are_refused():
    """With an index beside them (DSA), in 4 bits."""
    with pytest.raises(RuntimeError, match="plain KV pool of heads or of latents, this worker has MLATokenToKVPoolFP4"):
        PoolView.of(latent_pool(kind="MLATokenToKVPoolFP4"))
    with pytest.raises(RuntimeError, match="this worker has MLATokenToKVPool"):
        PoolView.of(latent_pool(use_dsa=True))


def test_layers_of_latents_are_not_cut():
    options, arguments = SimpleNamespace(**DECODE), SimpleNamespace(state_types=[], page_size=1)
    options.enable_hierarchical_cache = False
    check_options(options, arguments, DENSE, True)
    cut = DENSE.with_kv((KVSend(mode="sparse", n_last=4),) * LAYERS)
    with pytest.raises(RuntimeError, match=r"cuts layers of a model with latents \(MLA\).* kv.method none"):
        check_options(options, arguments, cut, True)


@torch.no_grad()
@pytest.mark.parametrize("architecture", LATENT)
def test_the_oracles_rows_are_what_sglangs_attention_would_write(architecture, tiny_dir):
    """SGLang's own rotation, of what the layer's projection gives: the channels of a pair stay neighbours."""
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    folder = tiny_dir(architecture)
    model, shape, projected = load_model(folder), read_checkpoint(folder).shape(), []
    hook = model.model.layers[1].self_attn.kv_a_proj_with_mqa.register_forward_hook(
        lambda _, __, out: projected.append(out[0])
    )
    oracle, ids = PDOracle(model, model, PDPlan.dense(shape)), torch.arange(3, 3 + TOKENS)[None]
    state = oracle.prefill(ids)
    hook.remove()
    rotary = model.model.rotary_emb
    angles = torch.arange(TOKENS)[:, None] * rotary.inv_freq
    cos, sin = (part * rotary.attention_scaling for part in (angles.cos(), angles.sin()))
    neighbours = getattr(model.config, "rope_interleave", True)  # as SGLang's deepseek_v2.py asks
    expected = apply_rotary_emb(projected[0][:, None, -ROPE:], cos, sin, not neighbours)[:, 0]
    torch.testing.assert_close(state.keys[1].flatten(1), expected, atol=1e-5, rtol=1e-5)


def test_torch_native_is_given_latents_for_every_batch(monkeypatch):
    """It reads the pool alone, where SGLang's model has K and V of heads beside it for a prompt without a prefix."""
    from pdtrim_sglang.attention.latents import read_latents_on_torch_native
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    monkeypatch.setattr(AttentionBackendRegistry, "_handlers", dict(AttentionBackendRegistry._handlers))
    before = dict(AttentionBackendRegistry._handlers)
    read_latents_on_torch_native(SimpleNamespace(use_mla_backend=False))
    assert AttentionBackendRegistry._handlers == before
    read_latents_on_torch_native(SimpleNamespace(use_mla_backend=True))
    assert AttentionBackendRegistry.get_handler("torch_native")(None, None).name == "MLA"
    assert AttentionBackendRegistry.get_handler("triton") is before["triton"]
