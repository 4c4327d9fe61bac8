"""FP8 as DeepSeek and Qwen publish it: a scale for each block (`weight_scale_inv`), or one a weight (`weight_scale`).

`quantization_config`: `weight_block_size` (none: one scale a weight), `activation_scheme`, `modules_to_not_convert` or
`ignored_layers`, `scale_fmt: ue8m0` where scales are powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.models.quantized.base import Quantized, UnsupportedScheme, block_size


class FP8:
    """Checkpoints with `quant_method: fp8`."""

    method = "fp8"

    def read(self, section: Mapping[str, Any]) -> Quantized:
        """See `base.Format`."""
        if (code := section.get("fmt") or "e4m3") != "e4m3":
            raise UnsupportedScheme(f"fmt {code}")
        side = section.get("weight_block_size")
        if side is None:
            static = section.get("activation_scheme") == "static"
            return Quantized(self.method, "weight_scale", section, inputs="stored" if static else "token")
        block, powers = block_size(side, "weight_block_size"), section.get("scale_fmt") == "ue8m0"
        return Quantized(self.method, "weight_scale_inv", section, block, powers, "group")
