"""Weights of codes and scales, and back: FP8 e4m3, one scale for a weight, for each row or for each block."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def dequantize(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """float32 `[out, in]`: codes (float8_e4m3fn) times their scales."""
    return codes.float() * _spread(scale.float(), codes.shape, block)


def quantize(weight: Tensor, like: Tensor, block: tuple[int, int] | None, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight `[out, in]`, scales of the shape and dtype that `like` has.

    The largest value under each scale gets the largest code; a scale over zeros is 1.
    """
    weight = weight.float()
    largest = _largest(weight.abs(), like.shape, block)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    if powers_of_two:
        scale = torch.exp2(torch.log2(scale).ceil())
    scale = scale.reshape(like.shape).to(like.dtype)
    # in bfloat16 a scale may be rounded down, to zero at the least: values beyond the largest code are cut to it
    divided = weight / _spread(scale.float(), weight.shape, block).clamp_min(torch.finfo(torch.float32).tiny)
    return divided.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """Scales as they multiply a weight of `shape`."""
    if block is None:
        return scale.reshape(-1, 1)
    rows = scale.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def _largest(sizes: Tensor, scale: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """The largest size under each scale."""
    if block is None:
        return sizes.amax() if scale.numel() == 1 else sizes.amax(dim=1)
    padding = [-size % side for size, side in zip(sizes.shape, block, strict=True)]
    padded = torch.nn.functional.pad(sizes, (0, padding[1], 0, padding[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax(dim=(1, 3))
