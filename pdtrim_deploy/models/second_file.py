"""The file of second K and V projections beside a prefill checkpoint: whether it is the plan's, by its header alone."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.tensors import read_header
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY

_NEEDED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
_AGAIN = "copy it from the bundle that the plan is of, or build the bundle again"


def check_second(folder: Path, plan: PDPlan) -> None:
    """Raise UserError where a plan has a tail and the file is missing or damaged, or of other blocks or heads."""
    if not plan.kv_only_tail:
        return
    path, blocks = folder / KV_ONLY, {plan.prefill_layers[layer] for layer in plan.kv_only_layers}
    if not path.is_file():
        raise UserError(f"{path}: missing, and with it the plan's second K and V projections; {_AGAIN}")
    try:
        tensors = read_header(path)
        present = {int(name.partition(".")[0]) for name in tensors}
    except (UserError, ValueError):
        raise UserError(f"{path}: truncated, or not a file of second K and V projections; {_AGAIN}") from None
    if present != blocks:
        raise UserError(f"{path}: is of blocks {sorted(present)}, the plan's are {sorted(blocks)}; {_AGAIN}")
    rows = plan.model.num_kv_heads * plan.model.head_dim
    for block, name in product(sorted(blocks), _NEEDED):
        info = tensors.get(f"{block}.{name}")
        if info is None or len(info.shape) != 2 or info.shape[0] != rows:
            raise UserError(f"{path}: has no {name} of {rows} rows for block {block}; {_AGAIN}")
