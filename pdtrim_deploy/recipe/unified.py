"""`stages: unified`: one model that prefills and decodes, in one checkpoint; what such a recipe may ask for.

The paper's PD-unified setting (PDTrim, arXiv:2509.04467): SGLang serves the checkpoint without disaggregation.
"""

from __future__ import annotations

from typing import Literal

from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.kv import KVSection
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.targets import TargetsSection

Stages = Literal["pair", "unified"]


def check_unified(
    pruning: PruningSection, healing: HealingSection, kv: KVSection, targets: TargetsSection, *, target: bool
) -> None:
    """Raise ValueError, saying what is allowed, for what takes two models; `target` is whether a target is given."""
    for lost in ("blocks", "attentions", "mlps"):
        before, after = (getattr(pruning, f"{stage}_{lost}") for stage in ("prefill", "decode"))
        if before != after:
            raise ValueError(
                f"stages is unified but pruning.prefill_{lost} is {before} and decode_{lost} is {after}; allowed: the "
                "same number for both, since one model does both stages"
            )
    if pruning.experts is not None and not pruning.experts.shared:
        raise ValueError("stages is unified but pruning.experts.shared is false; allowed: true, one set for one model")
    if kv.method != "none" or kv.wire_dtype != "native" or kv.pool_dtype != "native":
        raise ValueError(
            f"stages is unified but kv has method {kv.method}, wire_dtype {kv.wire_dtype}, pool_dtype {kv.pool_dtype}; "
            "allowed: none and native, since the KV of one model goes nowhere"
        )
    if names := [
        name for name in ("kv_only_blocks", "decode_steps", "kv_steps", "prompt_share") if getattr(healing, name)
    ]:
        raise ValueError(
            f"stages is unified but healing.{names[0]} is {getattr(healing, names[0])}; allowed: 0 (the one model is "
            "mended over whole texts, trained by prefill_steps, and runs all its blocks in both stages)"
        )
    if target or targets.requested:
        raise ValueError(
            f"stages is unified but {'target' if target else 'targets'} is given; allowed: neither, since both are "
            "about two stage models"
        )
