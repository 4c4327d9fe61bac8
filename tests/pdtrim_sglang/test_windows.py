"""Layers with windows in a worker: what SGLang must have loaded, and what it must not reuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from decodeoptions import DECODE

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

pytest.importorskip("sglang", reason="needs the serve environment")

SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=8, kv_dtype="float32", windows=(7, None)
)
PLAN = PDPlan.dense(SHAPE)
VIEW = SimpleNamespace(windowed=None)


def loaded(*windows):
    """A model whose attention layers were given these windows, as SGLang counts them."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from torch import nn

    return nn.ModuleList(
        RadixAttention(1, 8, 1.0, 1, layer_id=layer, sliding_window_size=window) for layer, window in enumerate(windows)
    )


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_model_with_the_plans_windows_is_served(stage):
    from pdtrim_sglang.requirements import check_windows

    check_windows(PLAN, stage, loaded(6, -1), VIEW)
    check_windows(PLAN, stage, loaded(6, None), VIEW)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (
            (7, -1),
            r"layer 0 attends to the last 7 tokens by the plan, to the last 8 tokens as this worker has loaded it",
        ),
        ((-1, -1), r"layer 0 attends to the last 7 tokens by the plan, to all tokens as this worker"),
        ((6, 6), r"layer 1 attends to all tokens by the plan, to the last 7 tokens as this worker"),
        (
            (),
            r"layer 0 attends to the last 7 tokens by the plan, to all tokens as this worker",
        ),  # an engine's model, say
    ],
)
def test_another_models_windows_are_refused(windows, words):
    from pdtrim_sglang.requirements import check_windows

    with pytest.raises(RuntimeError, match=words):
        check_windows(PLAN, "decode", loaded(*windows), VIEW)


def test_decode_reuses_no_prompt_whose_windows_alone_were_sent():
    """The next prompt's window begins before rows that this one's did not reach."""
    from pdtrim_sglang.requirements import check_options

    options, arguments = SimpleNamespace(**DECODE), SimpleNamespace(state_types=[], page_size=1)
    check_options(options, arguments, PDPlan.dense(SHAPE.with_windows(())), False)
    with pytest.raises(RuntimeError, match=r"layers with windows .*--disaggregation-decode-enable-radix-cache"):
        check_options(options, arguments, PLAN, False)


def test_layers_with_windows_are_whole_ones_in_decodes_pool():
    from pdtrim_sglang.kept_pool.rule import kept_rules

    assert kept_rules(PLAN) == {}
    cut = PLAN.with_kv((KVSend(mode="sparse", n_first=1, n_last=2),) * 2)
    assert list(kept_rules(cut)) == [1]


LAYERS, HEADS, DIM, WINDOW = 4, 2, 8, 9
SHAPE_OF_POOLS = ModelShape(
    architecture="X", fingerprint="f", num_blocks=LAYERS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32",
    windows=(WINDOW, None, WINDOW, None),
)  # fmt: skip


def window_pool(page, tokens=160, window_tokens=48):
    """SGLang's pool of windows beside that of whole layers, and its allocator; rows are random where they are."""
    import torch
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool = SWAKVPool(tokens, window_tokens, page, torch.float32, HEADS, DIM, [0, 2], [1, 3], "cpu")
    allocator = SWATokenToKVPoolAllocator(tokens, window_tokens, page, torch.float32, "cpu", pool, need_sort=False)
    return pool, allocator


def take(allocator, tokens, tail):
    """Slots of a prompt, whose last `tail` tokens alone have one in the pool of windows, as decode allocates them."""
    import torch

    zero, seq = torch.zeros(1, dtype=torch.int64), torch.tensor([tokens])
    return allocator.alloc_extend_swa_tail(zero, zero, seq, seq, torch.tensor([-1]), tokens, tail)


@pytest.mark.parametrize("prompt", [3, WINDOW - 1, WINDOW, 41])
@pytest.mark.parametrize("wire", ["native", "int8"])
@pytest.mark.parametrize("chunk", [8, 64])
def test_rows_go_from_one_pool_of_windows_to_another(prompt, wire, chunk):
    """Genuine pools and allocators; the workers' slots differ, pages are of several tokens, and chunks are cut."""
    import torch
    from pdtrim_sglang.packing import Chunk, Packer
    from pdtrim_sglang.pool import PoolView
    from pdtrim_sglang.rooms import AuxRows

    from pdtrim_deploy.kvcache.layout import chunk_layout
    from pdtrim_deploy.kvcache.pack import unpack

    plan, page = PDPlan.dense(SHAPE_OF_POOLS).with_kv((KVSend(wire_dtype=wire),) * LAYERS), 4
    (source, from_slots), (target, to_slots) = window_pool(page), window_pool(page)
    for pool in (source.full_kv_pool, source.swa_kv_pool):
        for rows in (*pool.k_buffer, *pool.v_buffer):
            rows.normal_()
    views = PoolView.of(source), PoolView.of(target)
    take(from_slots, 12, 12)
    prefill, decode = take(from_slots, prompt, min(prompt, 16)), take(to_slots, prompt, min(prompt, WINDOW - 1))
    assert not torch.equal(prefill, decode)
    slot = torch.zeros(1 << 16, dtype=torch.uint8)
    packer = Packer(plan, views[0], AuxRows((), ()), [slot])
    places = views[1].destinations(decode)
    for start in range(0, prompt, chunk):
        stop = min(prompt, start + chunk)
        pages = (prefill[start:stop:page] // page).int()
        slot.fill_(255)
        packed = packer.pack(0.0, Chunk(1, pages, start, prompt, start, stop, stop == prompt, 0, carries_aux=False), 0)
        layout = packed.layout
        assert layout.total_bytes == chunk_layout(plan, prompt, start, stop).total_bytes
        into, here = views[1], places.slots[:, start:stop]
        unpack(layout, slot[: layout.total_bytes], into.keys, into.values, here, groups=places.groups)
    for layer, window in enumerate(SHAPE_OF_POOLS.windows):
        sent = slice(0 if window is None else max(0, prompt - window + 1), prompt)
        for side in ("keys", "values"):
            there, here = (getattr(view, side)[layer] for view in views)
            if window is None:
                expected, arrived = there[prefill[sent]], here[decode[sent]]
            else:
                expected = there[source.full_to_swa_index_mapping[prefill[sent]]]
                arrived = here[target.full_to_swa_index_mapping[decode[sent]]]
            torch.testing.assert_close(arrived, expected, atol=0 if wire == "native" else 0.03, rtol=0)
            assert arrived.abs().sum() > 0
    held = target.swa_kv_pool.k_buffer[0].flatten(1).any(1)
    assert int(held.sum()) == min(prompt, WINDOW - 1)  # nothing was written for a token that no window holds


def test_a_pool_of_windows_is_as_large_as_that_of_whole_layers():
    import torch
    from pdtrim_sglang.plan_source import check_fits
    from pdtrim_sglang.pool import PoolView
    from pdtrim_sglang.requirements import check_windows

    pool, _ = window_pool(1)
    view = PoolView.of(pool)
    assert (view.tokens, len(view.keys), view.windowed.layers) == (161, 4, {0, 2})
    assert [len(rows) for rows in view.keys] == [49, 161, 49, 161]
    check_fits(PDPlan.dense(SHAPE_OF_POOLS), "decode", view.buffers, 1)
    model = loaded(WINDOW - 1, -1, WINDOW - 1, -1)
    check_windows(PDPlan.dense(SHAPE_OF_POOLS), "decode", model, view)
    cut = PDPlan.dense(SHAPE_OF_POOLS).with_kv((KVSend(mode="sparse", n_first=1),) * LAYERS)
    check_windows(cut, "prefill", model, view)
    with pytest.raises(RuntimeError, match="start decode with --disable-hybrid-swa-memory"):
        check_windows(cut, "decode", model, view)
    assert view.of_heads(range(1, 2)).destinations(torch.tensor([5])).slots[0].tolist() == [5]


def test_attention_that_misreads_a_pool_of_windows_is_refused_where_none_of_ours_reads_it():
    """On a CPU torch_native is `cpu.torch_attention`, whose test shows what SGLang's own would read."""
    from dataclasses import replace

    from pdtrim_sglang.pool import PoolView
    from pdtrim_sglang.requirements import check_windows

    pool, _ = window_pool(4)
    plan, model, view = PDPlan.dense(SHAPE_OF_POOLS), loaded(WINDOW - 1, -1, WINDOW - 1, -1), PoolView.of(pool)
    check_windows(plan, "prefill", model, view, "torch_native")
    on_gpu = replace(view, windowed=replace(view.windowed, of_slot=view.windowed.of_slot.to("meta")))
    check_windows(plan, "prefill", model, on_gpu, "triton")
    with pytest.raises(RuntimeError, match="torch_native reads SGLang's pool of windows by slots of whole layers"):
        check_windows(plan, "prefill", model, on_gpu, "torch_native")
