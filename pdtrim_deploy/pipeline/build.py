"""Run the steps that are not done yet, then seal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim_deploy import __version__
from pdtrim_deploy.bundle import Bundle, engine_folder
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models import resolve
from pdtrim_deploy.pipeline import engines, experts, heal, heal_kv, joint, sealing, select_kv, steps
from pdtrim_deploy.pipeline.chosen import EXPERTS
from pdtrim_deploy.pipeline.context import Context, Note
from pdtrim_deploy.pipeline.family_fit import check_experts, check_family, check_quantized
from pdtrim_deploy.pipeline.journal import Journal, chained_key, claim
from pdtrim_deploy.pipeline.limits import fit_build
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.pipeline.texts import check_longest
from pdtrim_deploy.plan import STAGES, UNIFIED, Stage
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.recipe.pruning_methods import EVALUATED, SEARCH_VERSION
from pdtrim_deploy.recipe.targets import Target

if TYPE_CHECKING:
    from pdtrim_deploy.pruning.ray_evaluator import Workers

# Called with a step's name and whether it is done already; the step runs inside.
Show = Callable[[str, bool], AbstractContextManager[object]]


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
    if recipe.target is not None:
        prune = chained_key("", base | {key: dump[key] for key in ("target", "kv", "calibration")})
        first = BuildStep("target", prune, joint.CHOSEN, joint.choose)
    kept = chained_key(prune, experts.depends_on(dump)) if keeps_experts else prune
    healed = chained_key(kept, heal.depends_on(recipe)) if heal.needed(recipe) else kept
    reads = recipe.kv.method not in FIXED_KV or recipe.kv.measures_offsets
    kv = chained_key(healed, [dump["kv"], dump["calibration"] if reads else None])
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
            else [_stage_step("prefill", kv, "select-kv"), _stage_step("decode", decode, before_decode)]
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


def build(
    recipe: Recipe,
    out: Path,
    cache: Cache,
    note: Note = lambda _: None,
    *,
    show: Show = lambda name, done: nullcontext(),
    force: bool = False,
    workers: Workers | None = None,
    compute: Compute = ON_CPU,
) -> Bundle:
    """Build `recipe` into `out`, resuming what an earlier build finished.

    `note` hears what is going on inside a step, `show` wraps each step, `force` makes every step again, Ray's `workers`
    evaluate the pruning search's candidates (the answer is that of this process alone). `compute` says on which devices
    the model is measured, fitted and trained; the recipe, in which dtype. A target that cannot be built
    is a sentence in the manifest's `failures`, and is tried again the next time.

    Raises:
        UserError: bad source, corpus or recipe for this model, or one that does not fit into the memory that `compute`
            allows; `out` is something else or in use.

    """
    from pdtrim_deploy.models.experts import check_formats
    from pdtrim_deploy.models.loading import check_loads

    if workers is not None:
        check_shared(recipe)
    with show("source", False):
        checkpoint = resolve(recipe.model.source, cache, note)
        check_family(recipe, checkpoint.family)
        expert_shape = checkpoint.family.expert_shape(checkpoint.config)
        check_experts(recipe, expert_shape)
        if recipe.pruning.experts:
            check_formats(checkpoint)
        check_quantized(recipe, checkpoint.quantized)
        check_loads(checkpoint, cache)
    check_fits(recipe, checkpoint.facts.num_blocks, checkpoint.facts.max_positions)
    here = None if workers is None else workers.count if workers.address is None else 0
    compute = fit_build(recipe, checkpoint.config, compute, workers=here)
    # A byte budget that nothing fits is refused at once.
    stand_in(recipe, checkpoint.shape(recipe.model.dtype), expert_shape)
    try:
        with claim(out, force):
            context = Context(recipe, checkpoint, cache, out, note, workers, compute)
            journal, plan_steps = Journal(out), steps_of(recipe, checkpoint.fingerprint)
            finished = done_steps(plan_steps, journal)
            if "select-kv" not in finished:
                check_longest(context)
            journal.keep_only(finished)
            failures: dict[str, str] = {}
            for step in plan_steps:
                if step.target in failures:  # in its prefill: half a pair serves nobody
                    continue
                done = step.name in finished
                with show(step.name, done):
                    if not done:
                        try:
                            with journal.making(step.name, step.key, step.outputs):
                                left = step.run(context)
                                for file in set(step.outputs) - set(left):
                                    (out / file).unlink(missing_ok=True)
                        except UserError as error:
                            if step.target is None:
                                raise
                            failures[step.target] = str(error)
            sealed = sealing.is_sealed(out, recipe, journal.steps)
            with show("seal", sealed):
                if not sealed:
                    sealing.seal_bundle(context, journal.steps, failures)
            return Bundle.open(out)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out} is not a folder; choose another --out") from None


def check_fits(recipe: Recipe, blocks: int, positions: int) -> None:
    """Refuse a recipe that asks for more than a model of `blocks` blocks has, or longer text than it takes."""
    removed, sparse, alone = recipe.pruning.decode_blocks, recipe.kv.sparse_layers, recipe.healing.kv_only_blocks
    if removed >= blocks:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_blocks is {removed}; allowed: at most {blocks - 1}, "
            f"the model has {blocks} blocks"
        )
    if (sublayers := recipe.pruning.decode_sublayers) > blocks - removed:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_attentions and decode_mlps are {sublayers}; allowed: at most "
            f"{blocks - removed}, the blocks that decode keeps, each of which can go without one sublayer"
        )
    attentions = blocks - removed - recipe.pruning.decode_attentions
    if not attentions:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_attentions is {blocks - removed}; allowed: at most "
            f"{blocks - removed - 1}, since decode sees the prompt by its attentions alone"
        )
    if sparse > attentions:
        layers = "layers with attention" if recipe.pruning.decode_attentions else "layers"
        raise UserError(
            f"recipe {recipe.name}: kv.sparse_layers is {sparse}; allowed: at most {attentions}, "
            f"the {layers} that decode keeps"
        )
    whole = attentions - recipe.pruning.prefill_mlps
    if alone > whole:
        raise UserError(
            f"recipe {recipe.name}: healing.kv_only_blocks is {alone}; allowed: at most {whole}, "
            f"the blocks whose KV decode reads"
        )
    for option, tokens in _lengths(recipe):
        if tokens > positions:
            raise UserError(
                f"recipe {recipe.name}: {option} is {tokens} tokens; allowed: at most {positions}, "
                f"the model's max_position_embeddings"
            )


def _lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """What each part of a build lets the model read at a time."""
    text, kv, healing = recipe.evaluation, recipe.kv, recipe.healing
    if recipe.pruning.decode_loses or recipe.pruning.experts:
        yield "calibration.length", recipe.calibration.length
    if healing.enabled:
        yield "healing.length", healing.length
    if kv.method not in FIXED_KV or recipe.target is not None:
        name = "longer_prompts" if kv.longer_prompts else "prompt_tokens"
        yield f"kv.{name} + kv.continuation_tokens", kv.prompts[-1] + kv.continuation_tokens
    if healing.kv_steps:
        yield "kv.prompt_tokens + half of healing.length", kv.prompt_tokens + healing.length // 2
    yield "evaluation.prompt_tokens + evaluation.continuation_tokens", text.prompt_tokens + text.continuation_tokens


def check_shared(recipe: Recipe) -> None:
    """Refuse for Ray's workers what bounds the memory of one process, and methods that ask nobody else."""
    if recipe.target is not None:
        raise UserError(f"recipe {recipe.name}: target is answered by one process alone; build without --workers")
    if recipe.pruning.decode_loses and recipe.pruning.method not in EVALUATED:
        raise UserError(
            f"recipe {recipe.name}: pruning.method is {recipe.pruning.method}, which one process searches alone; "
            f"build without --workers or choose one of {', '.join(EVALUATED)}"
        )
    for name, what in (
        ("blocks_in_memory", "holds the whole model"),
        ("disk_mb", "keeps hidden states in memory alone"),
    ):
        if getattr(recipe.pruning, name):
            raise UserError(
                f"recipe {recipe.name}: pruning.{name} is for a search in one process, but each worker {what}; "
                f"build without --workers or leave {name} out"
            )
