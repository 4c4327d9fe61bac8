"""Run the steps that are not done yet, then seal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models import resolve
from pdtrim_deploy.pipeline import sealing
from pdtrim_deploy.pipeline.build_steps import done_steps, steps_of
from pdtrim_deploy.pipeline.context import Context, Note
from pdtrim_deploy.pipeline.family_fit import check_experts, check_family, check_quantized
from pdtrim_deploy.pipeline.journal import Journal, claim, refuse_strangers
from pdtrim_deploy.pipeline.limits import fit_build
from pdtrim_deploy.pipeline.recipe_fit import check_fits, check_shared
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.pipeline.texts import check_texts
from pdtrim_deploy.recipe import Recipe

if TYPE_CHECKING:
    from pdtrim_deploy.pruning.ray_evaluator import Workers

# Called with a step's name and whether it is done already; the step runs inside.
Show = Callable[[str, bool], AbstractContextManager[object]]


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
    refuse_strangers(out)  # before a source is converted; `claim` looks again
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
            check_texts(context, finished)
            journal.keep_only(finished)
            failures: dict[str, str] = {}
            for step in plan_steps:
                if step.target in failures:  # in its prefill: half a pair serves nobody
                    continue
                done = step.name in finished
                if not done:
                    context.give_back()
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
            context.give_back()
            with show("seal", sealed):
                if not sealed:
                    sealing.seal_bundle(context, journal.steps, failures)
            return Bundle.open(out)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out} is not a folder; choose another --out") from None
