"""A pool on a GPU and staging memory on the host: the same bytes, and no operation across both."""

import pytest
import torch
from packcases import pools, random_offsets, shape
from pretended_gpu import PretendedGPU, gpu, host

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, prepare, unpack
from pdtrim_deploy.plan import Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES

TOKENS, SIZE = 40, 64


@pytest.fixture(autouse=True)
def pretended():
    with PretendedGPU():
        yield


def test_the_pretended_gpu_refuses_two_devices():
    there, here = torch.zeros(4, 3, device="cuda"), torch.ones(2, 3)
    assert there.device.type == "cuda"
    for across in (
        lambda: there.index_copy_(0, torch.arange(2, device="cuda"), here),
        lambda: torch.index_select(there, 0, torch.arange(2, device="cuda"), out=here),
        lambda: here + there[:2],
        lambda: torch.cat([here, there]),
        lambda: there.__setitem__(slice(0, 2), here),
    ):
        with pytest.raises(RuntimeError, match="two devices"):
            across()
    there[:2].copy_(here)
    assert torch.equal(host(there), torch.tensor([[1.0] * 3] * 2 + [[0.0] * 3] * 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_rows_of_a_pool_on_a_gpu_travel_through_host_memory(wire, dtype):
    model, whole = shape(3, 2, 32, dtype), KVSend(wire_dtype=wire)
    kv = (whole, whole.model_copy(update={"mode": "sparse", "n_first": 4, "n_last": 8}))
    plan = PDPlan(model=model, prefill=(Keep(),) * 3, decode=(Keep(), Drop(), Keep()), kv=kv)
    offsets = random_offsets(model, [0, 1])
    plan = plan.with_key_offsets(offsets.file)
    layout, slots = chunk_layout(plan, TOKENS, 0, TOKENS), torch.randperm(SIZE)[:TOKENS]
    keys, values = pools(3, SIZE, model, 0), pools(3, SIZE, model, 1)
    known = pack(layout, keys, values, slots, offsets=offsets)
    staging = torch.zeros(layout.total_bytes + 64, dtype=torch.uint8)
    packed = pack(layout, [gpu(k) for k in keys], [gpu(v) for v in values], gpu(slots), staging, offsets)
    assert packed.device.type == "cpu"
    assert packed.data_ptr() == staging.data_ptr()
    assert torch.equal(packed, known)
    there = pack(layout, [gpu(k) for k in keys], [gpu(v) for v in values], gpu(slots), offsets=offsets)
    assert there.device.type == "cuda", "without a buffer the bytes stay on the pool's device"
    for sent in (packed, there):
        empty, expected = ([torch.zeros_like(keys[0]) for _ in range(4)] for _ in range(2))
        unpack(layout, known, expected[:2], expected[2:], slots, offsets)
        moved = [gpu(pool) for pool in empty]
        unpack(layout, sent, moved[:2], moved[2:], gpu(slots), offsets)
        assert all(torch.equal(host(a), b) for a, b in zip(moved, expected, strict=True))


class Form:
    """Stands for `gpu.move`: notes what it is given, and moves by torch."""

    def __init__(self):
        self.calls = []

    def move(self, layout, packed, keys, values, slots, offsets, groups, *, pack):
        self.calls.append("pack" if pack else "unpack")
        assert all(tensor.is_cuda for tensor in (packed, slots, *keys, *values))
        (torch_pack.pack if pack else torch_pack.unpack)(
            layout, *((keys, values, slots, packed) if pack else (packed, keys, values, slots)), offsets, groups
        )
        return True

    def check(self, device):
        self.calls.append(f"check {device.type}")


@pytest.fixture
def form(monkeypatch):
    form = Form()
    monkeypatch.setattr("pdtrim_deploy.kvcache.gpu.library.library", lambda: form)
    return form


def test_a_gpu_is_given_to_the_triton_form(form):
    plan, slots = PDPlan.dense(shape(1, 2, 32)), torch.randperm(SIZE)[:TOKENS]
    layout, pool = chunk_layout(plan, TOKENS), [gpu(torch.randn(SIZE, 2, 32))]
    packed = pack(layout, pool, pool, gpu(slots))
    assert form.calls == ["pack"]  # whose fault nobody knows yet: `check` is the caller's, after its event
    staging = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    assert torch.equal(pack(layout, pool, pool, gpu(slots), staging), host(packed))
    assert form.calls[1:] == ["pack", "check cuda"]  # the copy to the host has waited
    unpack(layout, staging, pool, pool, gpu(slots))
    assert form.calls[3:] == ["unpack"]


@pytest.mark.parametrize("cut", [{}, {"mode": "sparse", "n_first": 4, "n_last": 8}])
def test_kernels_are_made_ready_for_a_plan_without_touching_the_pool(form, monkeypatch, cut):
    sends = (KVSend(wire_dtype="fp8"), KVSend(wire_dtype="k4v3", **cut))
    plan = PDPlan.dense(shape(2, 2, 32)).with_kv(sends)
    offsets, pool = random_offsets(plan.model, [1]), gpu(torch.full((SIZE, 2, 32), 7.0))
    summed = []
    monkeypatch.setattr("pdtrim_deploy.kvcache.pack.checksum", lambda packed: summed.append(packed.is_cuda))
    prepare(plan.with_key_offsets(offsets.file), pool, offsets)
    assert form.calls == ["pack", "unpack"] * 2
    assert summed == [True] * 2
    assert (host(pool) == 7).all()
