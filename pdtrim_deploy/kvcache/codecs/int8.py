"""int8: symmetric, one float16 scale for each row and KV head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, Less, quantise, values


class Int8(Codec):
    """`x = code * scale`, code in -127 .. 127, rounded to nearest even.

    Error of a value: at most scale / 2, 0.0040 of the largest magnitude in its row and head; plus 4e-6, which counts
    where that largest is below 0.008 and the scale is subnormal. Larger magnitudes than 8.3e6 saturate.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor], less: Less | None = None) -> None:
        codes, scale = sections
        codes.copy_(quantise(values(pool, index, less), 127, scale).round_())

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale = sections
        return torch.mul(codes, scale.float())
