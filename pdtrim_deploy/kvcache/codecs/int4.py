"""int4: rotated, then asymmetric in groups of 32 channels of one row and KV head: float16 scale and minimum each.

KIVI (arXiv:2402.02750) groups V along the channels of a token, and K, which has outlier channels, along 32 tokens of
a channel. Groups of tokens cannot be had here: chunked prefill and prefix hits cut a prompt anywhere, sparse layers
send a few rows, and a row's bytes must not depend on its neighbours. So both are grouped along the channels, and a
fixed orthonormal Hadamard rotation along the channels (as in QuaRot, arXiv:2404.00456) first spreads the outliers.

Measured on SmolLM2-135M, 8 x 448 Brown tokens, 5 bits a value each, mean KL of decode's next token to native KV
(x 1e-3): K by KIVI 2.3, K grouped along channels 5.6, the same rotated 3.3; V grouped along channels 1.1, rotated 0.7;
K and V by KIVI 3.3, as here 4.3 (`make bench-wire`; int8 0.09).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, take

TINY = 2.0**-24  # float16's least: no scale is zero
SLACK = 1 + 2.0**-10  # a scale is rounded up: no code overflows


class Int4(Codec):
    """`x = code * scale + minimum`, code in 0 .. 15, x the rows times `hadamard`.

    A byte holds channel `c` in its low and channel `c + head_dim / 2` in its high half.
    Error of a rotated value: at most scale / 2 = 0.034 of its group's range, plus 2^-11 of the group's minimum (which
    is rounded to float16); rotating back keeps the L2 norm of the errors of a head.
    Magnitudes: up to 6e4 after rotation, float16's own.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor]) -> None:
        codes, scale, minimum = sections
        x = _rotate(take(pool, index).float())
        groups = x.unflatten(-1, (minimum.shape[-1], -1))
        minimum.copy_(groups.amin(-1))
        low = minimum.float()
        scale.copy_(groups.amax(-1).sub_(low).clamp_(min=0).mul_(SLACK / 15).add_(TINY))
        groups.sub_(low[..., None]).mul_(scale.float().reciprocal_()[..., None]).round_().clamp_(min=0)
        first, second = x.chunk(2, -1)
        codes.copy_(first.add_(second, alpha=16))

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale, minimum = sections
        x = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], device=codes.device)
        first, second = x.chunk(2, -1)
        first.copy_(codes & 15)
        second.copy_(codes >> 4)
        x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.float()[..., None]).add_(minimum.float()[..., None])
        return _rotate(x)


def _rotate(x: Tensor) -> Tensor:
    """Multiply blocks of channels by the Hadamard matrix, which is its own inverse."""
    matrix = hadamard(x.shape[-1] & -x.shape[-1], x.device)
    return (x.view(-1, len(matrix)) @ matrix).view_as(x)


@lru_cache(maxsize=16)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix, float32 `[size, size]`, orthonormal and symmetric; `size` a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
