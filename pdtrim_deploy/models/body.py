"""The checkpoint within a prefill checkpoint that prompts run through before their tails. No torch.

Its blocks make K and V alone. Their MLPs never run, so the checkpoint has narrow ones, which take little disk, and
little memory while a worker loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.base import Family
from pdtrim_deploy.models.families.sizes import attention_sizes, mlp_width
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import BODY

_WIDTH_A_HEAD = 16  # whatever number of ranks divides the heads divides the width, and each has a multiple of 16


def body_width(config: Mapping[str, Any], *, quantized: bool) -> int | None:
    """Width of the MLPs in a body's checkpoint; None: the model's own, where that is narrower, or quantised."""
    width = _WIDTH_A_HEAD * attention_sizes(config)[0]
    return None if quantized or width >= mlp_width(config) else width


def body_config(config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """That of a body's checkpoint of so many blocks, as far as sizes need it; `config` is the model's."""
    width = body_width(config, quantized="quantization_config" in config)
    return {**config, "num_hidden_layers": blocks} | ({} if width is None else {"intermediate_size": width})


def narrowed(
    family: Family, config: Mapping[str, Any], blocks: Sequence[int], width: int | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the blocks' tensors, by name on disk, with MLPs of this width; none without one."""
    if width is None:
        return {}
    narrow = {**config, "intermediate_size": width}
    return {
        f"model.layers.{block}.{name}": shape
        for block in blocks
        for name, shape in family.block_tensors(narrow, block).items()
    }


def check_body(folder: Path, plan: PDPlan) -> None:
    """Raise UserError where a plan has a tail and its prefill checkpoint lacks that of the body, or has an old one."""
    if not plan.kv_only_tail:
        return
    if not (config := folder / BODY / "config.json").is_file():
        raise UserError(
            f"{folder / BODY}: missing, and with it the weights for all but the last {plan.kv_only_tail} prompt "
            "tokens; copy it from the bundle that the plan is of, or build the bundle again"
        )
    layers, alone = json.loads(config.read_text()).get("num_hidden_layers"), len(plan.kv_only_layers)
    if layers != alone:  # bundles had a whole model there
        raise UserError(
            f"{folder / BODY}: has {layers} layers, and the plan {alone} KV-only blocks, which alone belong there; "
            "build the bundle again"
        )
