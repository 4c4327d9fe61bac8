"""int4 and int3: rotated, then levels as a normal distribution wants them, one float16 scale for 64 channels of a head.

KIVI (arXiv:2402.02750) groups V along the channels of a token, and K, which has outlier channels, along 32 tokens of
a channel. Groups of tokens cannot be had here: chunked prefill and prefix hits cut a prompt anywhere, sparse layers
send a few rows, and a row's bytes must not depend on its neighbours. So both are grouped along the channels, and a
fixed Hadamard rotation along the channels (as in QuaRot, arXiv:2404.00456) first spreads the outliers. It is done by
sums and differences in a fixed order, and normalised by powers of two, so that every form has the same bytes.

Rotated values are nearly normal with mean zero (the constant that keys of some models hold is taken out before:
`kvcache/key_offsets.py`). So no minimum travels, and cells are narrower where most values are:
code `c` stands for the `y` with `floor(y * (curve - |y|) + 2^(bits - 1)) = c`, y within +-edge, which costs two
operations more than even cells; its level is the mean there of a normal distribution of which the largest of 64
values is `edge`.

4.25 and 3.25 bits a value. Squared error relative to the values': normal ones 0.0078 and 0.0317; K and V of
SmolLM2-135M in int4 0.0072 and 0.0078 (even cells 0.0093, 0.0083, 0.0092; groups of 32 with scale and minimum, 5 bits,
0.0061, 0.0057, 0.0061). What that does to decode's next token: `make bench-wire`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, Less, values

TINY = 2.0**-24  # float16's least: no scale is zero, but of zeros
SLACK = 1 + 2.0**-10  # a scale is rounded up: no code overflows


class Grid(NamedTuple):
    """Cells and levels of `bits` bits; `edge * (curve - edge)` is half their number; `positive`: the upper levels."""

    bits: int
    curve: float
    edge: float
    positive: tuple[float, ...]

    @property
    def half(self) -> int:
        return len(self.positive)

    @property
    def levels(self) -> tuple[float, ...]:
        return (*(-level for level in reversed(self.positive)), *self.positive)


INT4 = Grid(4, 6.6, 1.6, (0.077, 0.2352, 0.4017, 0.5782, 0.7669, 0.9707, 1.1933, 1.5093))
INT3 = Grid(3, 4.45, 1.25, (0.1158, 0.3613, 0.6422, 1.0297))
GRIDS = {"int4": INT4, "int3": INT3}


class Rotated(Codec):
    """`x = levels[code] * scale`, x the rotated rows; zeros have scale 0, and come back as zeros.

    int4: a byte holds channel `c` in its low and channel `c + head_dim / 2` in its high half.
    int3: for i < head_dim / 4, the codes of channels 2i, 2i + 1, head_dim / 2 + 2i, head_dim / 2 + 2i + 1 have their
    low two bits in byte i, from its lowest bits on, and their third bits in the low half of byte head_dim / 4 + i; or,
    where i >= head_dim / 8, in the high half of byte head_dim / 8 + i.

    Error of a rotated value: at most 0.05 (int4) or 0.1 (int3) of its group's largest magnitude, plus 0.08 or 0.1 of
    its own, plus 2^-27; rotating back keeps the ratio of the L2 norms of errors and values of a head.
    Magnitudes: up to 7.4e4 (5.7e4) in the L2 norm of a head; one whose scale float16 cannot hold counts as broken.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor], less: Less | None = None) -> None:
        codes, scale = sections
        x = hadamard(values(pool, index, less))
        x.mul_(2.0 ** -(halvings(x.shape[-1]) // 2))
        groups = x.unflatten(-1, (scale.shape[-1], -1))
        largest = torch.maximum(groups.amax(-1), groups.amin(-1).neg_())  # keeps NaN
        scale.copy_(largest.mul(SLACK / self.grid.edge).add_(TINY))
        broken = ~scale.isfinite().all(-1, keepdim=True)
        groups.mul_(scale.float().reciprocal_()[..., None])
        groups.mul_(self.grid.curve - groups.abs()).add_(self.grid.half).floor_()
        _PACK[self.grid.bits](x.masked_fill_(broken, 0), codes)
        scale.masked_fill_(largest == 0, 0).masked_fill_(broken, torch.nan)

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale = sections
        levels = torch.tensor(self.grid.levels, device=codes.device)
        x = levels[_UNPACK[self.grid.bits](codes)]
        x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.float()[..., None])
        return hadamard(x).mul_(2.0 ** -((halvings(x.shape[-1]) + 1) // 2))


def _pack_nibbles(x: Tensor, codes: Tensor) -> None:
    first, second = x.chunk(2, -1)
    codes.copy_(first.add_(second, alpha=16))


def _unpack_nibbles(codes: Tensor) -> Tensor:
    return torch.cat((codes & 15, codes >> 4), -1).int()


def _pack_threes(x: Tensor, codes: Tensor) -> None:
    four = x.to(torch.uint8).unflatten(-1, (2, -1, 2)).transpose(-2, -3).flatten(-2)  # [.., head_dim / 4, 4]
    quarter = four.shape[-2]
    shift = torch.arange(4, dtype=torch.uint8, device=x.device)
    codes[..., :quarter] = ((four & 3) << 2 * shift).sum(-1, dtype=torch.uint8)
    low, high = ((four >> 2) << shift).sum(-1, dtype=torch.uint8).chunk(2, -1)
    codes[..., quarter:] = low | high << 4


def _unpack_threes(codes: Tensor) -> Tensor:
    quarter = codes.shape[-1] * 2 // 3
    shift = torch.arange(4, dtype=torch.uint8, device=codes.device)
    thirds = torch.cat((codes[..., quarter:] & 15, codes[..., quarter:] >> 4), -1)
    four = (codes[..., :quarter, None] >> 2 * shift & 3) | (thirds[..., None] >> shift & 1) << 2
    return four.unflatten(-1, (2, 2)).transpose(-2, -3).flatten(-3).int()


_PACK = {4: _pack_nibbles, 3: _pack_threes}
_UNPACK = {4: _unpack_nibbles, 3: _unpack_threes}


def halvings(head_dim: int) -> int:
    """`n` where `2^n` is the largest power of two that divides `head_dim`."""
    return (head_dim & -head_dim).bit_length() - 1


def hadamard(x: Tensor) -> Tensor:
    """Multiply blocks of `2^n` channels of float32 `x` by Sylvester's Hadamard matrix of ones; twice gives `2^n x`.

    Channels `i` and `i + h` become their sum and their difference, for h = 1, 2, 4, .. in this order.
    """
    for n in range(halvings(x.shape[-1])):
        pairs = x.unflatten(-1, (-1, 2, 2**n))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
    return x
