"""FP8 of compressed-tensors (llm-compressor): a scale for each weight, row or block, in `weight_scale`.

`quantization_config`: `config_groups` of `targets` and `weights` (`type`, `num_bits`, `strategy`, `block_structure`),
`ignore` with names and `re:` patterns, `format` (float-quantized, naive-quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pdtrim_deploy.models.quantized.base import Quantized, UnsupportedScheme, block_size, mapping


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
            if value and not (key == "sparsity_config" and mapping(value, key).get("format") == "dense"):
                raise UnsupportedScheme(f"key {key}")
        groups = {name: mapping(group, f"group {name}") for name, group in groups.items()}
        blocks = {self._block(name, group) for name, group in groups.items()}
        if len(blocks) > 1 and blocks != {None}:
            raise UnsupportedScheme("groups with other blocks")
        inputs = {self._inputs(mapping(group.get("input_activations"), "activations")) for group in groups.values()}
        if len(inputs) > 1:
            raise UnsupportedScheme("groups with other activations")
        block, rounding = blocks.pop(), inputs.pop()
        if rounding == "group" and block is None:
            raise UnsupportedScheme("activations in groups beside weights that are not in blocks")
        if rounding == "token" and block is not None:
            rounding = "group"  # beside blocks SGLang rounds by groups, whatever the settings say
        return Quantized(self.method, "weight_scale", section, block, inputs=rounding)

    def _inputs(self, scheme: Mapping[str, Any]) -> Literal["token", "group", "stored"] | None:
        if not scheme:
            return None
        if not scheme.get("dynamic"):
            return "stored"
        return "group" if scheme.get("strategy") == "group" else "token"

    def _block(self, name: str, group: Mapping[str, Any]) -> tuple[int, int] | None:
        """Of a group's scales, None unless its strategy is by block."""
        weights = mapping(group.get("weights"), f"{name}: weights")
        kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) != ("float", 8) or not weights.get("symmetric", True):
            raise UnsupportedScheme(f"{name}: weights of {bits} bits, type {kind}")
        if strategy in ("tensor", "channel"):
            return None
        if strategy == "block":
            return block_size(weights.get("block_structure"), f"{name}: block_structure")
        raise UnsupportedScheme(f"{name}: strategy {strategy}")
