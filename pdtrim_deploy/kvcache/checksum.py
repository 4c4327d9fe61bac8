"""A checksum of packed bytes that are in a GPU's memory and stay there; one meaning, in torch and in Triton.

    sum over i of mix(word[i] + (i + 1) * GOLDEN), modulo 2^64

`word` are the bytes as little-endian int64, zeros after the last; `mix` is a bijection (splitmix64's finaliser). So one
damaged word is always noticed; several, or words at wrong places, unless 64 bits agree by chance. The length is not
covered: a header has it. It detects damage and late writes, and is no defence against somebody who computes it too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdtrim_deploy.kvcache.gpu import library as gpu

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as int64
SHIFTS = (30, 27, 31)
WORD = 8


def checksum(data: Tensor) -> Tensor:
    """int64 `[1]` on the device of `data` (uint8 `[bytes]`, contiguous, aligned to 8 bytes); nothing waits for it."""
    if data.is_cuda and gpu.library() is not None:
        from pdtrim_deploy.kvcache.gpu.checksum import launched

        return launched(data)
    return torch_checksum(data)


def torch_checksum(data: Tensor) -> Tensor:
    """The same by torch's own operations: what the kernel is held to, and stands in for it without Triton."""
    words = pad(data, (0, -len(data) % WORD)).view(torch.int64)
    mixed = words + torch.arange(1, len(words) + 1, device=data.device) * GOLDEN
    mixed = (mixed ^ _shifted(mixed, SHIFTS[0])) * FIRST
    mixed = (mixed ^ _shifted(mixed, SHIFTS[1])) * SECOND
    return (mixed ^ _shifted(mixed, SHIFTS[2])).sum().view(1)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
