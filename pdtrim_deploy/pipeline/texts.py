"""Which calibration text each part of a build learns from, or is judged on. All are int64 `[sequences, length]`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.recipe.kv import FIXED_KV

if TYPE_CHECKING:
    from torch import Tensor


def searched(context: Context) -> Tensor:
    """What blocks are chosen on."""
    text = context.recipe.calibration
    ids: Tensor = context.calibration(text.sequences, text.length, text.prompt)
    return ids


def fitted(context: Context) -> Tensor:
    """What stages are compensated and healed on; that again where they are not."""
    healing = context.recipe.healing
    if not healing.enabled:
        return searched(context)
    ids: Tensor = context.calibration(healing.sequences, healing.length)
    return ids


def taught(context: Context) -> Tensor:
    """What students learn from: all that is fitted, or what comes before `judged`."""
    healing, ids = context.recipe.healing, fitted(context)
    return ids[: healing.taught(context.recipe.pruning.finalists)] if healing.enabled else ids


def judged(context: Context) -> Tensor:
    """What finalists are judged on: students have not seen it, nor, with as much text as by default, has the search."""
    return fitted(context)[-context.recipe.healing.judged :]


def check_longest(context: Context) -> None:
    """Refuse, with UserError, prompts longer than the corpora have: before the steps that come before KV is chosen."""
    kv = context.recipe.kv
    if kv.method not in FIXED_KV and kv.longer_prompts:
        longest = kv.prompts[-1]
        try:
            context.drawn(kv.sequences, longest + kv.continuation_tokens, longest)
        except UserError as error:
            raise UserError(f"recipe {context.recipe.name}: kv.longer_prompts has {longest}, but {error}") from None


def digest(ids: Tensor) -> str:
    """SHA-256 of text, and of how long its sequences are."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
