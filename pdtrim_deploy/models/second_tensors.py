"""What KV-only blocks of a prefill with a tail have twice: the K and V projections, and norms, that make K and V alone.

They lie beside the prefill checkpoint, whose own tensors the tail runs through (`models/kv_only.py`).
"""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.block_tensors import BlockTensors, read_blocks
from pdtrim_deploy.models.outputs import OUTPUTS
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY


def divide(changed: BlockTensors, plan: PDPlan) -> tuple[BlockTensors, BlockTensors]:
    """Changed tensors of the prefill of a plan with a tail: those of its own layers, and what makes K and V alone."""
    alone = {plan.prefill_layers[layer] for layer in plan.kv_only_layers}
    own = {block: tensors for block, tensors in changed.items() if block not in alone}
    second = {
        block: {name: tensor for name, tensor in tensors.items() if name not in OUTPUTS}
        for block, tensors in changed.items()
        if block in alone
    }
    return own, second


def read_second(folder: Path, plan: PDPlan) -> BlockTensors:
    """Second projections of a prefill checkpoint, by block.

    Raises:
        UserError: the file is missing, or is not of the plan's blocks.

    """
    path, blocks = folder / KV_ONLY, {plan.prefill_layers[layer] for layer in plan.kv_only_layers}
    again = "copy it from the bundle that the plan is of, or build the bundle again"
    try:
        tensors = read_blocks(path)
    except Exception as error:  # safetensors raises its own
        raise UserError(f"{path}: the second K and V projections cannot be read ({error}); {again}") from None
    if set(tensors) != blocks:
        raise UserError(f"{path}: is of blocks {sorted(tensors)}, the plan's are {sorted(blocks)}; {again}")
    return tensors
