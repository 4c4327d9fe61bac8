"""Host memory that a GPU copies from or to is pinned where there is a GPU: else its copies make the host wait."""

import pytest
import torch
from pdtrim_sglang.packing import Packer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig
from pdtrim_sglang.transports.ring import Slot
from pdtrim_sglang.transports.tcp import InlineSendMover
from pretended_gpu import GPU, PretendedGPU, gpu

CONFIG = TransportConfig(staging_bytes=1 << 12, staging_slots=2)


@pytest.fixture
def pinned(monkeypatch):
    """Addresses of memory that `torch.empty` was to pin. With this driver nothing can be pinned."""
    addresses, genuine = set(), torch.empty

    def empty(*size, pin_memory=False, **options):
        memory = genuine(*size, **options)
        if pin_memory:
            addresses.add(memory.data_ptr())
        return memory

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return addresses


def test_slots_that_tcp_sends_from(pinned):
    slots = InlineSendMover(CONFIG).slots
    assert {slot.data_ptr() for slot in slots} == pinned
    assert len(slots) == 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_slots_that_are_received_into(pinned, on_gpu):
    """With payloads on a GPU the aux rows alone are on the host."""
    slot = Slot(1 << 12, None)
    if on_gpu:
        slot._device, slot._on_device = GPU, gpu(torch.zeros(1 << 12, dtype=torch.uint8))
    payload, aux = slot.take(100, 8)
    assert {(aux if on_gpu else payload).untyped_storage().data_ptr()} == pinned
    slot.take(1 << 11, 8)
    assert len(pinned) == 1  # pinned at once in the size that it can have


def test_checksums_that_a_gpu_computes(pinned):
    row = [torch.zeros(4, 1, 4)]
    slots = [gpu(torch.zeros(64, dtype=torch.uint8)) for _ in range(3)]
    sums = Packer(None, PoolView(row, row, 1), AuxRows((), ()), slots)._sums
    assert {total.data_ptr() for total in sums} == pinned
    assert len(pinned) == 3


def test_slots_of_a_chunk_reach_the_gpu_without_a_wait():
    """A copy from memory that is not pinned, or one that is not asynchronous, waits for the stream."""
    calls = []

    class Noted(PretendedGPU):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.pin_memory, torch.Tensor.to):
                calls.append((func.__name__, *map(str, args[1:]), kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs)

    row = [gpu(torch.zeros(16, 1, 4))]
    with Noted():
        slots = PoolView(row, row, 4).slots(torch.tensor([3, 1]).int(), 6)
    assert slots.is_cuda
    assert slots.tolist() == [12, 13, 14, 15, 4, 5]
    assert calls == [("pin_memory", {}), ("to", "cuda:0", {"non_blocking": True})]
