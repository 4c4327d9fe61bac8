"""The checksum of `pdtrim_deploy.kvcache.checksum` as one Triton launch. Needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words of a program


@triton.jit
def _mix(words, places):
    mixed = words + (places + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["size"])  # each chunk has its own: compiled once
def add_words(data, size, total, block: tl.constexpr):
    """Add this program's words to `total`; the first program adds the last, incomplete one too."""
    whole = size // 8
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < whole
    words = tl.load(data.to(tl.pointer_type(tl.int64)) + places, mask=inside, other=0)
    result = tl.sum(tl.where(inside, _mix(words, places), 0), axis=0)
    lanes = tl.arange(0, 8)
    rest = (lanes < size % 8) & (tl.program_id(0) == 0)
    tail = tl.load(data + whole * 8 + lanes, mask=rest, other=0).to(tl.int64) << (lanes * 8).to(tl.int64)
    last = tl.where(lanes == 0, tl.sum(tail, axis=0), 0)
    ends = (lanes == 0) & (size % 8 > 0) & (tl.program_id(0) == 0)
    result += tl.sum(tl.where(ends, _mix(last, lanes * 0 + whole.to(tl.int64)), 0), axis=0)
    tl.atomic_add(total, result, sem="relaxed")


def launched(data: Tensor) -> Tensor:
    """int64 `[1]` beside `data` (uint8, contiguous, aligned to 8 bytes), once the current stream has come so far."""
    total = torch.zeros(1, dtype=torch.int64, device=data.device)
    programs = max(1, triton.cdiv(len(data), 8 * BLOCK))
    add_words[(programs,)](data, len(data), total, block=BLOCK, num_warps=8)
    return total
