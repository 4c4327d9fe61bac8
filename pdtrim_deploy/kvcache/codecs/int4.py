"""int4: rotated, then 16 levels as a normal distribution wants them, one float16 scale for 64 channels of a KV head.

KIVI (arXiv:2402.02750) groups V along the channels of a token, and K, which has outlier channels, along 32 tokens of
a channel. Groups of tokens cannot be had here: chunked prefill and prefix hits cut a prompt anywhere, sparse layers
send a few rows, and a row's bytes must not depend on its neighbours. So both are grouped along the channels, and a
fixed Hadamard rotation along the channels (as in QuaRot, arXiv:2404.00456) first spreads the outliers. It is done by
sums and differences in a fixed order, and normalised by powers of two, so that every form has the same bytes.

Rotated values are nearly normal with mean zero. So no minimum travels, and cells are narrower where most values are:
code `c` stands for the `y` with `floor(y * (6.6 - |y|) + 8) = c`, y within +-1.6, which costs two operations more than
even cells; its level is the mean there of a normal distribution of which the largest of 64 values is 1.6.

4.25 bits a value. Squared error relative to the values': normal ones 0.0078, K and V of SmolLM2-135M 0.0072 and 0.0078
(even cells 0.0093, 0.0083, 0.0092; groups of 32 with scale and minimum, 5 bits, 0.0061, 0.0057, 0.0061).
Mean KL of decode's next token to native KV, SmolLM2-135M, 8 x 448 Brown tokens (x 1e-3): 6.2 (`make bench-wire`; int8
0.09); with those groups of 32 4.3 rotated, and 3.3 in KIVI's groups for K and V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, take

CURVE = 6.6
EDGE = 1.6  # EDGE * (CURVE - EDGE) = 8
POSITIVE = (0.077, 0.2352, 0.4017, 0.5782, 0.7669, 0.9707, 1.1933, 1.5093)
LEVELS = (*(-level for level in reversed(POSITIVE)), *POSITIVE)
TINY = 2.0**-24  # float16's least: no scale is zero, but of zeros
SLACK = 1 + 2.0**-10  # a scale is rounded up: no code overflows


class Int4(Codec):
    """`x = LEVELS[code] * scale`, code in 0 .. 15, x the rotated rows; zeros have scale 0, and come back as zeros.

    A byte holds channel `c` in its low and channel `c + head_dim / 2` in its high half.
    Error of a rotated value: at most 0.05 of its group's largest magnitude, plus 0.08 of its own, plus 2^-27;
    rotating back keeps the ratio of the L2 norms of errors and values of a head.
    Magnitudes: up to 7.4e4 in the L2 norm of a head; one with a scale that float16 cannot hold counts as broken.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor]) -> None:
        codes, scale = sections
        x = hadamard(take(pool, index).float())
        x.mul_(2.0 ** -(halvings(x.shape[-1]) // 2))
        groups = x.unflatten(-1, (scale.shape[-1], -1))
        largest = torch.maximum(groups.amax(-1), groups.amin(-1).neg_())  # keeps NaN
        scale.copy_(largest.mul(SLACK / EDGE).add_(TINY))
        broken = ~scale.isfinite().all(-1, keepdim=True)
        groups.mul_(scale.float().reciprocal_()[..., None])
        groups.mul_(CURVE - groups.abs()).add_(8).floor_()
        first, second = x.masked_fill_(broken, 0).chunk(2, -1)
        codes.copy_(first.add_(second, alpha=16))
        scale.masked_fill_(largest == 0, 0).masked_fill_(broken, torch.nan)

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale = sections
        levels = torch.tensor(LEVELS, device=codes.device)
        x = torch.cat((levels[(codes & 15).int()], levels[(codes >> 4).int()]), -1)
        x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.float()[..., None])
        return hadamard(x).mul_(2.0 ** -((halvings(x.shape[-1]) + 1) // 2))


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
