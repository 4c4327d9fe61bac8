"""What KV is chosen on: stages, the KV section's text, and a memo of what was measured on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdtrim_deploy.bundle import WORK
from pdtrim_deploy.pipeline import texts
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe.kv_cost import STATES

if TYPE_CHECKING:
    from torch import Tensor

    from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
    from pdtrim_deploy.kvchoice import Problem
    from pdtrim_deploy.kvchoice.base import Memo
    from pdtrim_deploy.models.oracle import PDOracle


def problem_of(context: Context, oracle: PDOracle, prompt_tokens: int, plan: PDPlan, weights: str | None) -> Problem:
    """The KV section's text with prompts of that length, and stages of `plan` whose changed weights have a digest."""
    from pdtrim_deploy.kvchoice import Problem

    section, seed = context.recipe.kv, context.recipe.calibration.seed
    text = context.calibration(section.sequences, prompt_tokens + section.continuation_tokens, prompt_tokens)
    if section.recall:
        text = texts.recalled(context, text, prompt_tokens)
    about = [plan.digest, weights]
    kept, states = _kept(context, text, prompt_tokens, oracle.offsets, about), context.compute.states(STATES)
    return Problem(oracle, text, prompt_tokens, seed, kept, context.out / WORK, state_bytes=states)


_EFFECTS = 1  # version of what is kept


def _kept(
    context: Context, text: Tensor, prompt_tokens: int, offsets: KeyOffsets | None, stages: list[str | None]
) -> Memo:
    """Keeps measured effects in the cache: the same blocks and text with another budget need no measuring."""
    from safetensors.torch import load_file

    from pdtrim_deploy.models.writer import save

    about = [_EFFECTS, context.measured_model, *stages, prompt_tokens]
    about += [context.recipe.calibration.seed, hashlib.sha256(text.numpy().tobytes()).hexdigest()]
    about += [] if offsets is None else [offsets.file.sha256]

    def kept(name: str, make: Callable[[], Tensor]) -> Tensor:
        key = hashlib.sha256(json.dumps([*about, name]).encode()).hexdigest()
        folder = context.cache.entry(
            "kv-effects", key, lambda place: save({"kept": make()}, place / "kept.safetensors")
        )
        return load_file(folder / "kept.safetensors")["kept"]

    return kept
