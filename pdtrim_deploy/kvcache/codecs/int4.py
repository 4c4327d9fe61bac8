"""int4: rotated, then asymmetric in groups of 32 channels of one row and KV head: float16 scale and minimum each.

KIVI (arXiv:2402.02750) groups V along the channels of a token, and K, which has outlier channels, along 32 tokens of
a channel. Groups of tokens cannot be had here: chunked prefill and prefix hits cut a prompt anywhere, sparse layers
send a few rows, and a row's bytes must not depend on its neighbours. So both are grouped along the channels, and a
fixed Hadamard rotation along the channels (as in QuaRot, arXiv:2404.00456) first spreads the outliers. It is done by
sums and differences in a fixed order, and normalised by powers of two, so that every form has the same bytes.

Measured on SmolLM2-135M, 8 x 448 Brown tokens, 5 bits a value each, mean KL of decode's next token to native KV
(x 1e-3): K by KIVI 2.3, K grouped along channels 5.6, the same rotated 3.3; V grouped along channels 1.1, rotated 0.7;
K and V by KIVI 3.3, as here 4.3 (`make bench-wire`; int8 0.09).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, take

TINY = 2.0**-24  # float16's least: no scale is zero
SLACK = 1 + 2.0**-10  # a scale is rounded up: no code overflows


class Int4(Codec):
    """`x = code * scale + minimum`, code in 0 .. 15, x the rotated rows.

    A byte holds channel `c` in its low and channel `c + head_dim / 2` in its high half.
    Error of a rotated value: at most scale / 2 = 0.034 of its group's range, plus 2^-15 of the group's minimum (which
    is rounded down to float16, so that no code is negative); rotating back keeps the ratio of the L2 norms of errors
    and values of a head.
    Magnitudes: up to 4.6e4 in the L2 norm of a head; one whose minimum or scale float16 cannot hold counts as broken.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor]) -> None:
        codes, scale, minimum = sections
        x = hadamard(take(pool, index).float())
        x.mul_(2.0 ** -(halvings(x.shape[-1]) // 2))
        groups = x.unflatten(-1, (minimum.shape[-1], -1))
        minimum.copy_(float16_below(groups.amin(-1).add_(0)))  # no -0
        low = minimum.float()
        scale.copy_(groups.amax(-1).sub_(low).clamp_(min=0).mul_(SLACK / 15).add_(TINY))
        broken = ~(minimum.isfinite() & scale.isfinite()).all(-1, keepdim=True)  # amin and amax keep NaN
        groups.sub_(low[..., None]).mul_(scale.float().reciprocal_()[..., None]).round_()
        first, second = x.masked_fill_(broken, 0).chunk(2, -1)
        codes.copy_(first.add_(second, alpha=16))
        for section in (scale, minimum):
            section.masked_fill_(broken, torch.nan)

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale, minimum = sections
        x = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], device=codes.device)
        first, second = x.chunk(2, -1)
        first.copy_(codes & 15)
        second.copy_(codes >> 4)
        x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.float()[..., None]).add_(minimum.float()[..., None])
        return hadamard(x).mul_(2.0 ** -((halvings(x.shape[-1]) + 1) // 2))


def float16_below(x: Tensor) -> Tensor:
    """The largest float16 that is not above each of float32 `x`."""
    nearest = x.half()
    bits = nearest.view(torch.int16)
    below = (bits + torch.where(bits < 0, 1, -1).short()).view(torch.float16)
    return torch.where(nearest.float() > x, below, nearest)


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
