"""The steps of a build, and which of them an earlier build has done: each step's key digests what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from pdtrim_deploy import __version__
from pdtrim_deploy.bundle import engine_folder
from pdtrim_deploy.pipeline import engines, experts, heal, heal_kv, joint, select_kv, steps
from pdtrim_deploy.pipeline.chosen import EXPERTS
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.journal import Journal, chained_key
from pdtrim_deploy.plan import STAGES, UNIFIED, Stage
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.recipe.pruning_methods import EVALUATED, SEARCH_VERSION
from pdtrim_deploy.recipe.recall_bounds import MIXED_VERSION
from pdtrim_deploy.recipe.targets import Target

_BODY = f"{BODY} 2"  # whose MLPs are narrow


@dataclass(frozen=True)
class BuildStep:
    """One step: `key` digests everything its `outputs` (files or folders of the bundle) depend on.

    `run` returns those outputs that it left; the others are an earlier recipe's, and are removed. `after`
    names the step whose key is in this one's. A step of a `target` may fail without failing the build.
    """

    name: str
    key: str
    outputs: tuple[str, ...]
    run: Callable[[Context], Collection[str]]
    after: str | None = None
    target: str | None = None


def steps_of(recipe: Recipe, fingerprint: str) -> tuple[BuildStep, ...]:
    """All steps but the seal. Each key holds the one before: a change makes its step and all later ones again."""
    dump, keeps_experts = recipe.model_dump(mode="json"), recipe.pruning.experts is not None
    base = {"pdtrim-deploy": __version__, "model": fingerprint, "dtype": recipe.model.dtype}
    base |= {} if recipe.model.measured_in == "float32" else {"measured_in": recipe.model.measured_in}
    base |= {} if recipe.stages == "pair" else {"stages": recipe.stages}
    chosen = {key: dump[key] for key in ("calibration", "pruning", *(["students"] if recipe.pruning.distil else []))}
    chosen["pruning"] = {key: value for key, value in dump["pruning"].items() if key != "experts"}
    if recipe.pruning.method in EVALUATED:
        chosen["search"] = SEARCH_VERSION
    if recipe.pruning.finalists or recipe.pruning.distil:  # students learn from part of this text
        text = [dump["healing"][name] for name in ("compensation", "sequences", "length")]
        rules = {name: dump["healing"][name] for name in ("fit", "prompt_share") if name in dump["healing"]}
        chosen["judged"] = [*text, recipe.healing.enabled, *([rules] if rules and recipe.pruning.finalists else [])]
    prune = chained_key("", base | (chosen if recipe.pruning.decode_loses else {}))
    first = BuildStep("prune", prune, steps.PRUNED, steps.prune)
    mixed_recall = {"recall": MIXED_VERSION} if recipe.kv.recall and len(recipe.calibration.shares) > 1 else {}
    if recipe.target is not None:
        prune = chained_key("", base | {key: dump[key] for key in ("target", "kv", "calibration")} | mixed_recall)
        first = BuildStep("target", prune, joint.CHOSEN, joint.choose)
    kept = chained_key(prune, experts.depends_on(dump)) if keeps_experts else prune
    healed = chained_key(kept, heal.depends_on(recipe)) if heal.needed(recipe) else kept
    reads = recipe.kv.method not in FIXED_KV or recipe.kv.measures_offsets
    kv = chained_key(healed, [dump["kv"], dump["calibration"] if reads else None, *mixed_recall.values()])
    trained = [recipe.healing.decides(trains=True), dump["kv"], dump["calibration"]]
    decode = chained_key(kv, trained) if recipe.healing.kv_steps else kv
    before_healing = "experts" if keeps_experts else first.name
    before_kv = "heal" if heal.needed(recipe) else before_healing
    before_decode = "heal-kv" if recipe.healing.kv_steps else "select-kv"
    return (
        first,
        *([BuildStep("experts", kept, (EXPERTS,), experts.keep_experts, "prune")] if keeps_experts else []),
        *([BuildStep("heal", healed, (heal.HEALING,), heal.heal, before_healing)] if heal.needed(recipe) else []),
        BuildStep("select-kv", kv, select_kv.SELECTED, select_kv.select_kv, before_kv),
        *(
            [BuildStep("heal-kv", decode, (heal_kv.HEALING_KV,), heal_kv.heal_kv, "select-kv")]
            if recipe.healing.kv_steps
            else []
        ),
        *(
            [_stage_step("prefill", kv, "select-kv", UNIFIED)]
            if recipe.stages == "unified"
            else [
                _stage_step("prefill", chained_key(kv, _BODY) if recipe.healing.kv_only_tail else kv, "select-kv"),
                _stage_step("decode", decode, before_decode),
            ]
        ),
        *(
            _engine_step(
                target, stage, section, chained_key(decode if stage == "decode" else kv, stage), dump["calibration"]
            )
            for target, section in recipe.targets.requested.items()
            for stage in STAGES
        ),
    )


def _stage_step(stage: Stage, before: str, after: str, folder: str | None = None) -> BuildStep:
    """Writes the stage's checkpoint into `folder`, by default the stage's name."""
    name = folder or stage
    return BuildStep(name, chained_key(before, name), (name,), lambda c: steps.write_stage(c, stage), after)


def _engine_step(target: str, stage: Stage, section: Target, stage_key: str, calibration: object) -> BuildStep:
    """Depends on its stage's checkpoint and its own options: another target's change nothing."""
    name = engine_folder(target, stage)
    key = chained_key(stage_key, [name, engines.depends_on(section, calibration)])
    run = partial(engines.build_engine, target=target, stage=stage, section=section)
    return BuildStep(name, key, (name,), run, stage, target)


def done_steps(steps: Sequence[BuildStep], journal: Journal) -> set[str]:
    """Names of those that need not be made again: they are done, and so is all that they depend on."""
    done: set[str] = set()
    for step in steps:
        if (step.after is None or step.after in done) and journal.done(step.name, step.key):
            done.add(step.name)
    return done
