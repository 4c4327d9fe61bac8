"""fp8: e4m3 (4 exponent bits, 3 mantissa bits, largest 448), one float16 scale for each row and KV head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, Less, quantise, values


class Fp8(Codec):
    """`x = code * scale`, code an OCP e4m3 value (no infinities), rounded to nearest even.

    Error of a value: at most 2^-4 of its own magnitude, or scale * 2^-10, 2.2e-6 of the largest magnitude in its row
    and head, where that is more; plus 1.4e-5, which counts where that largest is below 0.028 and the scale is
    subnormal. Larger magnitudes than 2.9e7 saturate.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor], less: Less | None = None) -> None:
        codes, scale = sections
        codes.copy_(quantise(values(pool, index, less), 448, scale))

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        codes, scale = sections
        # Its sign, exponent and mantissa, put where float16 has them, are the value / 256, subnormals too: torch's own
        # conversion from e4m3 is several times slower on a CPU.
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return torch.mul(bits.view(torch.float16), scale.float().mul_(256))
