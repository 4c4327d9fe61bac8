"""A chunk with a slot outside the pool fails its own request, also where others were packed before it is waited for."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import packing
from pdtrim_sglang.packing import Chunk, Packer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.rooms import AuxRows
from pretended_gpu import GPU, PretendedGPU, gpu

from pdtrim_deploy.kvcache.gpu import faults
from pdtrim_deploy.plan import ModelShape, PDPlan

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=4, kv_dtype="float32")
TOKENS, WRONG = 4, 9  # a page that the pool does not have


def packed_by_kernels(layout, keys, values, slots, out=None, *_):
    """As they do: the flag of the thread is written, nothing is raised."""
    if int(slots.max()) >= len(keys[0]):
        faults.flag_of(GPU).fill_(1)
    return torch.zeros(layout.total_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_of_two_chunks_that_wait_in_their_slots_the_wrong_one_is_blamed(monkeypatch, order):
    monkeypatch.setattr(packing, "pack", packed_by_kernels)
    monkeypatch.setattr(PoolView, "record_event", lambda _: SimpleNamespace(synchronize=lambda: None))
    with PretendedGPU():
        pool = PoolView([gpu(torch.zeros(16, 1, 4))], [gpu(torch.zeros(16, 1, 4))], TOKENS)
        packer = Packer(PDPlan.dense(SHAPE), pool, AuxRows((), ()), [torch.zeros(256, dtype=torch.uint8)] * 2)
        pages = (torch.tensor([WRONG]), torch.tensor([1]))
        packed = [
            packer.pack(0.0, Chunk(room, page, 0, TOKENS, 0, TOKENS, True, 0), room) for room, page in enumerate(pages)
        ]
    for room in order:
        if room == 0:
            with pytest.raises(IndexError, match="outside its pool"):
                packed[room].wait()
        else:
            packed[room].wait()
