"""The step between choosing blocks and choosing KV: students of distilled pairs, compensation, healing.

What it makes is large and dear, so it lies in the cache, whole or not at all, under a digest of all it depends on;
the bundle's report names that digest, and both stage checkpoints get the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import REPORTS, WORK
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline import texts
from pdtrim_deploy.pipeline.chosen import chosen, kv_only_blocks
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.training_costs import holds_model
from pdtrim_deploy.plan import STAGES, KVOnly, PDPlan, Stage
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import HealingSection

if TYPE_CHECKING:
    from torch import Tensor

    from pdtrim_deploy.models.block_tensors import BlockTensors
    from pdtrim_deploy.pruning.pair import StagePair

HEALING = f"{REPORTS}/healing.json"
_VERSION = 3  # of how weights are made
_KV_ONLY_VERSION = 5  # the same where some blocks run for their K and V alone
_PAIR_VERSION = 6  # the same where they are trained
_TAIL_VERSION = 3  # the same with a tail
_TRAINING = 1  # version of training by gradients
_RESCALED = 2  # version of how it is decided whether rescaling helps

Changed = Mapping[Stage, "BlockTensors"]


def needed(recipe: Recipe) -> bool:
    """Whether the recipe asks for other weights than the model's own."""
    return recipe.changes_weights


def depends_on(recipe: Recipe) -> list[Any]:
    """What the step depends on besides the one before."""
    dump = recipe.model_dump(mode="json")
    alone = [_version(recipe)] if recipe.healing.kv_only_blocks else []  # other recipes' keys are older than versions
    tail = [recipe.healing.kv_only_tail] if recipe.healing.kv_only_tail else []  # of the plan, not of the weights
    return [dump["students"], _section(recipe.healing), dump["calibration"], *alone, *tail]


def _version(recipe: Recipe) -> int:
    """Of how weights are made where some blocks run for their K and V alone."""
    return _PAIR_VERSION if recipe.healing.prefill_steps else _KV_ONLY_VERSION


def _section(section: HealingSection) -> dict[str, Any]:
    """What the section decides of the weights, without what is done once KV is chosen."""
    decides = section.decides(trains=section.trains)
    kept = {name: value for name, value in decides.items() if name not in ("kv_steps", "kv_only_tail")}
    if section.kv_only_tail:
        kept["judged_from"] = section.judged_from(section.length) if section.trains else None
        kept["tail"] = _TAIL_VERSION
    kept |= {"rescaled": _RESCALED} if section.compensation == "norm" else {}
    return kept | ({"training": _TRAINING} if section.trains else {})


def blocks_plan(context: Context) -> PDPlan:
    """What each stage runs; all KV travels whole."""
    plan = chosen(context)
    if not needed(context.recipe):
        return plan
    alone = json.loads((context.out / HEALING).read_text())["kv_only_blocks"]
    prefill = tuple(KVOnly() if block in alone else action for block, action in enumerate(plan.prefill))
    return plan.with_parts(prefill=prefill, kv_only_tail=context.recipe.healing.kv_only_tail)


def heal(context: Context) -> set[str]:
    """Make the weights that differ from the model's -> the cache, reports/healing.json."""
    key = _key(context)
    report = json.loads((_entry(context, key) / "report.json").read_text())
    write_atomic(context.out / HEALING, json.dumps({"weights": key} | report, indent=2) + "\n")
    return {HEALING}


def changed(context: Context) -> Changed:
    """The tensors of each stage that differ from the model's, by block; nothing when the recipe asks for none."""
    if not needed(context.recipe):
        return {}
    from pdtrim_deploy.models.block_tensors import read_blocks

    folder = _entry(context, json.loads((context.out / HEALING).read_text())["weights"])
    tensors = {stage: read_blocks(folder / f"{stage}.safetensors") for stage in _mended_stages(context)}
    return {stage: tensors.get(stage, tensors["prefill"]) for stage in STAGES}


def weights(context: Context) -> str | None:
    """Digest of what this step made; None when the recipe asks for nothing."""
    return json.loads((context.out / HEALING).read_text())["weights"] if needed(context.recipe) else None


def healed(context: Context) -> dict[Stage, dict[str, Any]]:
    """What healing by gradients did to each stage that had some: `steps`, `before`, `after`, `kept`."""
    return json.loads((context.out / HEALING).read_text())["healing"] if needed(context.recipe) else {}


def left_out(context: Context) -> tuple[Stage, ...]:
    """Stages that are not rescaled, since it did not help them."""
    rescaled = json.loads((context.out / HEALING).read_text())["rescaled"] if needed(context.recipe) else {}
    return tuple(stage for stage in STAGES if stage in rescaled and not rescaled[stage]["kept"])


def _holds_model(context: Context) -> bool:
    return holds_model(context.recipe, ModelSizes.of(context.checkpoint.config))


def training_folder(context: Context) -> Path | None:
    """Where trained weights lie in mapped files, where training streams a model whose blocks are bounded; else None."""
    return context.out / WORK if context.bounded and not _holds_model(context) else None


def stage_pair(context: Context, plan: PDPlan | None = None, bounded: bool = False) -> StagePair:
    """Both stages as this step leaves them, with the plan's KV rules, or all KV whole.

    In memory; `bounded`: with as many blocks in memory as the recipe allows.
    """
    from pdtrim_deploy.pruning.pair import StagePair

    model = context.streamed_model if bounded else context.model
    return StagePair(model, plan or blocks_plan(context), changed(context))


def _key(context: Context) -> str:
    plan, recipe = chosen(context), context.recipe
    read = [texts.digest(text(context)) for text in (texts.taught, texts.fitted)]
    version = _version(recipe) if recipe.healing.kv_only_blocks else _VERSION
    parts = [version, plan.digest, recipe.students.model_dump(mode="json"), _section(recipe.healing), read]
    parts += [] if context.compute.dtype == "float32" else [context.compute.dtype]
    parts += [] if recipe.target is None else [_version(recipe), kv_only_blocks(context)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _entry(context: Context, key: str) -> Path:
    def make(folder: Path) -> None:
        from pdtrim_deploy.models.block_tensors import save_blocks

        pair, report = _make(context, key)
        for stage in _mended_stages(context):
            save_blocks(pair.changed.get(stage, {}), folder / f"{stage}.safetensors")
        (folder / "report.json").write_text(json.dumps(report, indent=2))

    entry = context.cache.entry("stage-weights", key, make)
    for stage in STAGES:
        training_file(context, stage).unlink(missing_ok=True)
    return entry


def _mended_stages(context: Context) -> tuple[Stage, ...]:
    """Stages whose weights this step makes: one model is mended as prefill is, over whole texts."""
    return ("prefill",) if context.recipe.stages == "unified" else STAGES


def training_file(context: Context, name: str) -> Path:
    """Where training stands, while it goes on."""
    return context.out / WORK / f"healing-{name}.safetensors"


def _make(context: Context, key: str) -> tuple[StagePair, dict[str, Any]]:
    """Students first; then compensation and healing of prefill; then those of decode, behind it.

    K and V of blocks that are there for them alone are fitted again behind compensation, then trained with the rest.
    """
    from pdtrim_deploy.pruning.compensation import FitRules, get_compensation
    from pdtrim_deploy.pruning.healing import StateFile
    from pdtrim_deploy.pruning.healing import heal as train
    from pdtrim_deploy.pruning.healing.learnt import learns
    from pdtrim_deploy.pruning.kv_only import fit, fit_kv_only, make_kv_only
    from pdtrim_deploy.pruning.pair import StagePair

    section, ids = context.recipe.healing, texts.fitted(context)
    few = ids[: section.fitted] if section.enabled else ids  # of fits without gradients
    model = context.model if section.trains and _holds_model(context) else context.streamed_model
    pair, report = _with_students(context, StagePair(model, chosen(context)))
    if section.kv_only_blocks:
        pair = make_kv_only(pair, section.kv_only_blocks, few, context.note, section.kv_only_tail)
    elif context.recipe.target is not None and (alone := kv_only_blocks(context)):
        pair = fit_kv_only(pair, alone, few, context.note)
    report["kv_only_blocks"] = pair.plan.kv_only_blocks
    for stage in _mended_stages(context):
        blocks_lost = any(action.kind != "keep" for action in pair.plan.actions(stage))
        if not blocks_lost and not pair.plan.kept_experts(stage):
            continue  # nothing was lost
        served = stage == "decode" or not section.kv_only_tail  # else only its KV is: no output is to be made up for
        if blocks_lost and served and section.compensation != "none" and _helps(context, pair, stage, few, report):
            mend = get_compensation(section.compensation, FitRules.of(section)).compensate
            pair = mend(pair, stage, few, context.note)
            if stage == "prefill" and pair.plan.kv_only_layers:
                pair = fit(pair, few, context.note)
        if section.steps_of(stage) and not learns(pair, stage):
            context.note(f"healing {stage}: left out, decode reads K and V of none of the blocks that would be trained")
        elif section.steps_of(stage):
            file = StateFile(training_file(context, stage), key)
            if stage == "prefill" and file.load() is None:
                training_file(context, "decode").unlink(missing_ok=True)  # it is about another prefill's KV
            trained = train(
                pair, stage, ids, section, context.note,
                file=file, folder=training_folder(context), scratch=context.out / WORK,
            )  # fmt: skip
            pair = trained.pair
            report["healing"][stage] = trained.report
    return pair, report


def _helps(context: Context, pair: StagePair, stage: Stage, ids: Tensor, report: dict[str, Any]) -> bool:
    """Whether rescaling is kept: where it helps on text not fitted. Least squares asks that itself, layer by layer."""
    if context.recipe.healing.compensation != "norm":
        return True
    from pdtrim_deploy.pruning.compensation import get_compensation
    from pdtrim_deploy.pruning.compensation.held_out import held_out

    loss = held_out(get_compensation("norm"), pair, stage, ids)
    verdict = "kept" if loss.kept else "left out: it does not help"
    context.note(f"{stage}: rescaled, {loss.before:.4f} -> {loss.after:.4f} nats on text not fitted; {verdict}")
    report["rescaled"][stage] = asdict(loss) | {"kept": loss.kept}
    return loss.kept


def _with_students(context: Context, pair: StagePair) -> tuple[StagePair, dict[str, Any]]:
    from pdtrim_deploy.pruning.students import Students

    recipe, fingerprint = context.recipe, context.measured_model
    report: dict[str, Any] = {
        "students": {},
        "compensation": recipe.healing.compensation,
        "rescaled": {},
        "healing": {},
    }
    students = Students(
        pair.model, texts.taught(context), recipe.students,
        cache=context.cache, fingerprint=fingerprint, work=context.out / WORK, note=context.note,
    )  # fmt: skip
    for stage in STAGES:
        pairs = {a.pair for a in pair.plan.actions(stage) if a.kind == "distilled"}
        pair = pair.with_changes(stage, {both[0]: students.tensors(both) for both in sorted(pairs)})
        report["students"] |= {f"{both[0]}-{both[1]}": students.lesson(both) for both in sorted(pairs)}
    return pair, report
