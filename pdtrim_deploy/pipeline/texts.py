"""Which calibration text each part of a build learns from, or is judged on. All are int64 `[sequences, length]`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
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


def recalled(context: Context, ids: Tensor, prompt_tokens: int) -> Tensor:
    """Calibration text in which `kv.recall` of the sequences, of every corpus alike, repeat a passage of the prompt."""
    from pdtrim_deploy.evaluation.corpora.mixture import in_turn
    from pdtrim_deploy.kvchoice.recall import with_recall

    section = context.recipe.calibration
    parts = in_turn([part.share for part in section.shares], len(ids))
    return with_recall(ids, prompt_tokens, context.recipe.kv.recall, section.seed, parts)


def check_file(corpus: str, cache: Cache) -> None:
    """Refuse, with UserError, calibration text of a user's own file that cannot be read or divided."""
    from pdtrim_deploy.evaluation import corpora

    if corpus.partition(":")[0] in corpora.OF_FILES:
        corpora.load(corpus, cache).split("calibration")


def check_texts(context: Context, done: Collection[str] = ()) -> None:
    """Draw all text that the steps which are not `done` read, without what the model writes itself.

    Raises:
        UserError: the corpora cannot be had, or have too little of it; names the option that asks for it.

    """
    for (sequences, length, prompt), option in _needed(context, done).items():
        try:
            context.drawn(sequences, length, prompt)
        except UserError as error:
            raise UserError(f"recipe {context.recipe.name}: {option}: {error}") from None


_Drawn = tuple[int, int, int | None]  # sequences, tokens of each, and of its prompt (None: half)


def _needed(context: Context, done: Collection[str]) -> dict[_Drawn, str]:
    """What is drawn, and the option of the recipe that asks for it."""
    recipe, needed = context.recipe, dict[_Drawn, str]()
    text, healing, kv, pruning = recipe.calibration, recipe.healing, recipe.kv, recipe.pruning
    searched = pruning.decode_loses and recipe.target is None
    if (searched and "prune" not in done) or (pruning.experts and "experts" not in done):
        needed[text.sequences, text.length, text.prompt] = "calibration"
    fitted = searched and (pruning.finalists or pruning.distil) and "prune" not in done
    if healing.enabled and (fitted or "heal" not in done):
        needed.setdefault((healing.sequences, healing.length, None), "healing")
    if recipe.changes_weights and not healing.enabled and "heal" not in done:  # `fitted` is that then
        needed[text.sequences, text.length, text.prompt] = "calibration"
    chooses, answers = "select-kv" not in done, recipe.target is not None and "target" not in done
    if answers:
        tokens = kv.prompt_tokens
        needed.setdefault((kv.sequences, tokens + kv.continuation_tokens, tokens), "kv")
    if chooses or answers:
        if chooses and kv.method not in FIXED_KV:
            for tokens in kv.prompts:
                option = f"kv.longer_prompts has {tokens}" if tokens != kv.prompt_tokens else "kv"
                needed.setdefault((kv.sequences, tokens + kv.continuation_tokens, tokens), option)
        if kv.measures_offsets and context.shape.offsets_keys:
            tokens = min(kv.prompt_tokens, context.checkpoint.facts.max_positions)
            needed.setdefault((kv.sequences, tokens, tokens), "kv")
    if healing.kv_steps and "heal-kv" not in done:
        prompt = kv.prompt_tokens
        needed.setdefault((healing.sequences, prompt + healing.length // 2, prompt), "healing.kv_steps")
    return needed


def digest(ids: Tensor) -> str:
    """SHA-256 of text, and of how long its sequences are."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
