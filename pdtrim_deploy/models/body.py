"""The checkpoint within a prefill checkpoint that prompts run through before their tails. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import BODY


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
