"""The step behind the choice of KV: decode, healed to read prompt KV as it will arrive.

As the weights of `pipeline.heal`, what it makes lies in the cache; reports/healing-kv.json names it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import REPORTS
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.pipeline import heal, texts
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import STAGES, Stage

if TYPE_CHECKING:
    from torch import Tensor

HEALING_KV = f"{REPORTS}/healing-kv.json"
_VERSION = 2  # of how weights are made


def heal_kv(context: Context) -> set[str]:
    """Make the weights of decode that differ from those before -> the cache, reports/healing-kv.json."""
    key = _key(context)
    report = json.loads((_entry(context, key) / "report.json").read_text())
    write_atomic(context.out / HEALING_KV, json.dumps({"weights": key} | report, indent=2) + "\n")
    return {HEALING_KV}


def changed(context: Context) -> heal.Changed:
    """The tensors of each stage that differ from the model's in the end, by block."""
    from pdtrim_deploy.models.block_tensors import read_blocks

    before = heal.changed(context)
    if not context.recipe.healing.kv_steps:
        return before
    key = json.loads((context.out / HEALING_KV).read_text())["weights"]
    merged = {block: dict(tensors) for block, tensors in before.get("decode", {}).items()}
    for block, tensors in read_blocks(_entry(context, key) / "decode.safetensors").items():
        merged.setdefault(block, {}).update(tensors)
    return {**before, "decode": merged}


def healed(context: Context) -> dict[Stage, list[dict[str, Any]]]:
    """What gradients did to each stage, one after the other: `steps`, `before`, `after`, `kept`, `kv`."""
    done: dict[Stage, list[dict[str, Any]]] = {
        stage: [{**report, "kv": False}] for stage, report in heal.healed(context).items()
    }
    if context.recipe.healing.kv_steps:
        report = json.loads((context.out / HEALING_KV).read_text())
        done.setdefault("decode", []).append({**report, "kv": True})
    return done


def _key(context: Context) -> str:
    section, text = context.recipe.healing.decides(trains=True), _text(context)
    parts = [
        _VERSION,
        context.plan.digest,
        heal.weights(context),
        section,
        hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        *([] if context.compute.dtype == "float32" else [context.compute.dtype]),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _text(context: Context) -> Tensor:
    """Prompts as KV is chosen on, each with half of `healing.length` behind it; int64."""
    from pdtrim_deploy.recipe.recall_bounds import fits

    recipe = context.recipe
    prompt, more = recipe.kv.prompt_tokens, recipe.healing.length // 2
    ids = context.calibration(recipe.healing.sequences, prompt + more, prompt)
    if recipe.kv.recall and fits(prompt, more):
        return texts.recalled(context, ids, prompt)
    return ids


def _entry(context: Context, key: str) -> Path:
    def make(folder: Path) -> None:
        from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
        from pdtrim_deploy.models.block_tensors import save_blocks
        from pdtrim_deploy.models.oracle import PDOracle
        from pdtrim_deploy.pruning.healing import PromptKV, StateFile
        from pdtrim_deploy.pruning.healing import heal as train

        mapped_in = heal.training_folder(context)
        pair = heal.stage_pair(context, context.plan, bounded=mapped_in is not None)
        prefill, decode = (pair.stage(stage) for stage in STAGES)
        oracle = PDOracle(prefill, decode, context.plan, KeyOffsets.read(context.out, context.plan))
        prompt_kv = PromptKV(context.recipe.kv.prompt_tokens, lambda prompts: oracle.hand_over(oracle.prefill(prompts)))
        file = StateFile(heal.training_file(context, "kv"), key)
        section, ids = context.recipe.healing, _text(context)
        trained = train(pair, "decode", ids, section, context.note, prompt_kv, file, folder=mapped_in)
        save_blocks(trained.pair.changed.get("decode", {}) if trained.kept else {}, folder / "decode.safetensors")
        (folder / "report.json").write_text(json.dumps(trained.report, indent=2))

    entry = context.cache.entry("stage-weights", key, make)
    heal.training_file(context, "kv").unlink(missing_ok=True)
    return entry
