"""Disk and memory: what the machine has and what a recipe needs, estimated from the model's config alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.doctor.base import ALL, CheckContext, Finding, Job
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.local.machine import memory
from pdtrim_deploy.local.processor import compute_dtype
from pdtrim_deploy.models.body import body_config
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.footprint import PROGRAM, gb
from pdtrim_deploy.models.quantized import with_quantization
from pdtrim_deploy.models.shape import config_of
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.limits import fit_build, highest
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving.environment import gpu_count
from pdtrim_deploy.worker.memory import worker_memory

POOL_TOKENS = 8192  # what `serve` gives a worker by default
_WHILE_IT_RUNS = ("prune", "target", "experts", "heal", "select-kv", "heal-kv")  # whose files go with the step


@dataclass(frozen=True)
class Needs:
    """What a recipe needs.

    Attributes:
        build, judge, serve: bytes of host memory to build, to judge, to serve 1 + 1 workers on a CPU.
        device: bytes on GPUs to build; 0 where it is built on a CPU.
        disk: bytes of files.
        steps: of the build, by their names.
        compute: with the limits that the allowed memory asks for.
        config: of the model.

    """

    build: float
    judge: float
    serve: float
    device: float
    disk: float
    steps: Mapping[str, StepCost]
    compute: Compute
    config: Mapping[str, Any]


def needs(recipe: Recipe, workers: int = 0, compute: Compute = ON_CPU, judged_in: str | None = None) -> Needs | None:
    """The needs of `recipe`; None if the model's config.json is neither on this machine nor shipped.

    Memory to build is that of its highest step (`pipeline.step_costs`), and the search's once more in each of Ray's
    `workers`; memory to judge that of models in `judged_in`, None: in the dtype that `eval` takes by itself. Disk: both
    stages as they are stored, the engines, and a converted source (gguf, pypi).

    Raises:
        UserError: it does not fit into the memory that `compute` allows.

    """
    path = config_of(recipe.model.source)
    if path is None:
        return None
    config = with_quantization(path.parent, read_config(path))
    compute = fit_build(recipe, config, compute, workers=workers or None)
    costs, sizes = step_costs(recipe, config, compute, workers), ModelSizes.of(config)
    kept = sum(cost.disk for name, cost in costs.items() if name not in _WHILE_IT_RUNS)
    passing = costs["source"].disk + max(cost.disk for name, cost in costs.items() if name in _WHILE_IT_RUNS)
    judged_in = judged_in or recipe.model.compute_dtype or compute_dtype(recipe.model.dtype)
    worker = worker_memory(config, recipe.model.dtype, POOL_TOKENS, pool_dtype=recipe.kv.pool_dtype)
    bodies = 0.0  # loaded beside a prefill with a tail: a share of the model
    if recipe.healing.kv_only_tail:
        bodies = ModelSizes.of(body_config(config, recipe.healing.kv_only_blocks)).total / sizes.total
    return Needs(
        build=highest(costs).host,
        judge=PROGRAM + (2 + bodies) * sizes.total * ITEM_BYTES[judged_in],  # both stages, or the dense model
        serve=2 * worker.total() + bodies * worker.weights,
        device=highest(costs).device,
        disk=max(kept, passing),
        steps=costs,
        compute=compute,
        config=config,
    )


@dataclass(frozen=True)
class Memory:
    """RAM of the machine, or of its cgroup when that is less."""

    jobs: tuple[Job, ...] = ALL

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding about the machine, and one per job of the recipe."""
        total, free = memory()
        yield Finding(group="machine", name="memory", status="ok", detail=f"{gb(total)}, {gb(free)} of it free")
        try:
            estimate = (
                needs(context.recipe, context.workers, context.compute, context.judged_in) if context.recipe else None
            )
        except UserError as error:
            yield Finding(
                group="recipe",
                name="memory to build",
                status="missing",
                detail=str(error),
                mend="allow more with --memory or --device-memory",
                needed_by=("build", "demo"),
            )
            return
        if estimate is None or context.recipe is None:
            return
        sizes: dict[Job, float] = {"build": estimate.build}
        if context.compute.host_bytes is None:  # else `fit_judging` says
            sizes["eval"] = estimate.judge
        if not gpu_count():
            sizes["serve"] = estimate.serve
        for job, size in sizes.items():
            fits = size <= total
            yield Finding(
                group="recipe",
                name=f"memory to {job}",
                status="ok" if fits else "missing",
                detail=f"{context.recipe.name} takes about {gb(size)}; this machine has {gb(total)}, {gb(free)} free",
                mend=None if fits else _more_memory(context.recipe, job, size, total),
                needed_by=(job, "demo"),
            )


def _more_memory(recipe: Recipe, job: Job, size: float, total: int) -> str:
    """How a job that is too large for this machine runs: block by block, where that fits."""
    machine, allowed = f"{job} it on a machine with {gb(size)} of memory", total * 9 // 10**7 * 10**6
    try:
        streams = job != "serve" and needs(recipe, compute=ON_CPU.within(allowed, None)) is not None
    except UserError:
        streams = False
    return f"{machine}, or block by block with {job} --memory {allowed // 10**6}MB" if streams else machine


@dataclass(frozen=True)
class Disk:
    """Free space where the bundle goes."""

    jobs: tuple[Job, ...] = ("build", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line."""
        place = next(folder for folder in (context.out.absolute(), *context.out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        try:
            estimate = needs(context.recipe, context.workers, context.compute) if context.recipe else None
        except UserError:  # `Memory` reports it
            estimate = None
        fits = estimate is None or estimate.disk <= free
        detail = f"{gb(free)} free at {place}"
        if estimate and context.recipe:
            detail += f"; {context.recipe.name} takes about {gb(estimate.disk)}"
        yield Finding(
            group="recipe" if estimate else "machine",
            name="disk",
            status="ok" if fits else "missing",
            detail=detail,
            mend=None if fits else "free some space, or name another folder with --out",
            needed_by=self.jobs,
        )
