"""FP8 of NVIDIA's modelopt: one scale a weight in `weight_scale`, one for what goes into it in `input_scale`.

`quantization_config` of config.json (`quant_algo`, `ignore`), or `quantization` of hf_quant_config.json (`quant_algo`,
`exclude_modules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.models.quantized.base import Quantized, UnsupportedScheme


class ModelOpt:
    """Checkpoints with `quant_method: modelopt`."""

    method = "modelopt"

    def read(self, section: Mapping[str, Any]) -> Quantized:
        """See `base.Format`."""
        algorithm = section.get("quant_algo")
        if algorithm != "FP8":
            raise UnsupportedScheme(f"quant_algo {algorithm}")
        return Quantized(self.method, "weight_scale", section)
