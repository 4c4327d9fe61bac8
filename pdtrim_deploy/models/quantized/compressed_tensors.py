"""FP8 of compressed-tensors (llm-compressor): a scale for each weight, row or block, in `weight_scale`.

`quantization_config`: `config_groups` of `targets` and `weights` (`type`, `num_bits`, `strategy`, `block_structure`),
`ignore` with names and `re:` patterns, `format` (float-quantized, naive-quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.models.quantized.base import Quantized, UnsupportedScheme


class CompressedTensors:
    """Checkpoints with `quant_method: compressed-tensors`."""

    method = "compressed-tensors"

    def read(self, section: Mapping[str, Any]) -> Quantized:
        """See `base.Format`."""
        groups = section.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise UnsupportedScheme("no config_groups")
        for key in ("sparsity_config", "transform_config"):
            value = section.get(key)
            if value and not (key == "sparsity_config" and value.get("format") == "dense"):
                raise UnsupportedScheme(f"key {key}")
        blocks = {self._block(name, group) for name, group in groups.items()}
        if len(blocks) > 1 and blocks != {None}:
            raise UnsupportedScheme("groups with other blocks")
        return Quantized(self.method, "weight_scale", section, blocks.pop())

    def _block(self, name: str, group: Mapping[str, Any]) -> tuple[int, int] | None:
        """Of a group's scales, None unless its strategy is by block."""
        weights = group.get("weights") or {}
        kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) != ("float", 8) or not weights.get("symmetric", True):
            raise UnsupportedScheme(f"{name}: weights of {bits} bits, type {kind}")
        if strategy in ("tensor", "channel"):
            return None
        side = weights.get("block_structure")
        if strategy == "block" and isinstance(side, list) and len(side) == 2:
            return int(side[0]), int(side[1])
        raise UnsupportedScheme(f"{name}: strategy {strategy}")
