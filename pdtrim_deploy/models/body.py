"""The checkpoint within a prefill checkpoint that prompts run through before their tails. No torch."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import BODY


def check_body(folder: Path, plan: PDPlan) -> None:
    """Raise UserError where a plan has a tail and its prefill checkpoint lacks that of the body."""
    if plan.kv_only_tail and not (folder / BODY / "config.json").is_file():
        raise UserError(
            f"{folder / BODY}: missing, and with it the weights for all but the last {plan.kv_only_tail} prompt "
            "tokens; copy it from the bundle that the plan is of, or build the bundle again"
        )
