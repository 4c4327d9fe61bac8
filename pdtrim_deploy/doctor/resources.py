"""Disk and memory: what the machine has and what a recipe needs, estimated from the model's config alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.doctor.base import ALL, CheckContext, Finding, Job, gb
from pdtrim_deploy.local.machine import memory
from pdtrim_deploy.local.processor import compute_dtype
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import family_of
from pdtrim_deploy.models.shape import config_of
from pdtrim_deploy.models.weights import ModelSizes, one_expert
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.pruning.cost import fitted_bytes, search_cost
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.recipe.kv_cost import selection_cost
from pdtrim_deploy.serving.environment import gpu_count
from pdtrim_deploy.worker.memory import worker_memory

PROGRAM = 0.55e9  # Python, torch and transformers with a tokenizer, measured (tests/doctor/test_measured_memory.py)
SHARD = 4e9  # of a stage, as `checkpoints.writer` cuts it
POOL_TOKENS = 8192  # what `serve` gives a worker by default


@dataclass(frozen=True)
class Needs:
    """Bytes that a recipe needs: memory to build, to judge, to serve 1 + 1 workers on a CPU; disk."""

    build: float
    judge: float
    serve: float
    disk: float


def needs(recipe: Recipe, workers: int = 0) -> Needs | None:
    """The needs of `recipe`; None if the model's config.json is neither on this machine nor shipped.

    Memory to build: the model in float32 if something is measured on it (if only the search is, no more than
    `pruning.blocks_in_memory` allows), and once more in each of Ray's `workers`; trained weights four times more (a
    copy, gradients, Adam's two means); the sums of a least-squares fit, or later one batch of the KV choice; one shard
    of a stage. An engine counts as its stage in float32, built in a process that holds it three times. Disk: both
    stages in the recipe's dtype, the engines, and a converted source (gguf, pypi).
    """
    path = config_of(recipe.model.source)
    if path is None:
        return None
    config = read_config(path)
    count, item = ModelSizes.of(config).total, ITEM_BYTES[recipe.model.dtype]
    computed = compute_dtype(recipe.model.dtype)
    converted = 0 if recipe.model.source.startswith("hf:") else count * 4
    engines = len(recipe.targets.requested) * 2 * count * 4
    cost = search_cost(config, recipe.pruning, recipe.calibration, recipe.healing)
    selection = selection_cost(config, recipe.kv, recipe.model.dtype)
    searching, states = (cost.memory, cost.disk) if cost else (0, 0)
    return Needs(
        build=PROGRAM
        + max(
            1.1 * _measured_on(recipe, config) * 4
            + max(4 * _trained(recipe, config) * 4 + _fitted(recipe, config), selection.memory),
            searching + workers * (PROGRAM + searching),
            min(SHARD, count * item),
        )
        + (2 * count * 4 if recipe.targets.requested else 0),
        judge=PROGRAM + 2 * count * ITEM_BYTES[computed],  # both stages, or the dense model
        serve=2 * worker_memory(config, recipe.model.dtype, POOL_TOKENS, pool_dtype=recipe.kv.pool_dtype).total(),
        disk=converted + states + max(2 * count * item + engines, selection.disk),
    )


def _measured_on(recipe: Recipe, config: dict[str, Any]) -> int:
    """Weights in memory at a time while they are measured, with the hidden states of a bounded search as weights."""
    pruning, sizes = recipe.pruning, ModelSizes.of(config)
    healed = needed(recipe) and recipe.healing.trains
    whole_model = healed or recipe.healing.kv_steps > 0
    kv_measured = recipe.kv.method not in FIXED_KV or recipe.kv.measures_offsets
    if pruning.blocks_in_memory is None or whole_model:
        measured = whole_model or pruning.decode_loses or pruning.experts or kv_measured or needed(recipe)
        return sizes.total + _kept_experts(recipe, config) if measured else 0
    student_blocks = 4 if pruning.distil else 0  # both parents, and both blocks that a student may start from
    held = min(sizes.blocks, pruning.blocks_in_memory) + student_blocks
    return sizes.ends + held * sizes.block + (pruning.memory_mb << 20) // 4


def _kept_experts(recipe: Recipe, config: dict[str, Any]) -> int:
    """Weights of kept experts, of which each stage in memory has copies."""
    section, sizes = recipe.pruning.experts, ModelSizes.of(config)
    shape = family_of(config, recipe.model.source).expert_shape(config)
    if section is None or shape is None:
        return 0
    counts = [section.count(stage, shape.count) for stage in STAGES if getattr(section, stage) is not None]
    return sum(count * sizes.blocks * one_expert(config, sizes.blocks - 1) for count in counts)


def _trained(recipe: Recipe, config: dict[str, Any]) -> int:
    """Weights trained by gradients at a time: a stage's blocks, or one student."""
    pruning, healing, sizes = recipe.pruning, recipe.healing, ModelSizes.of(config)
    decode_steps = healing.decode_steps or healing.kv_steps
    steps = ((healing.prefill_steps, pruning.prefill_blocks), (decode_steps, pruning.decode_blocks))
    most = max([sizes.blocks - removed for count, removed in steps if count] + [1 if recipe.students.steps else 0])
    return sizes.block * most


def _fitted(recipe: Recipe, config: dict[str, Any]) -> int:
    """Bytes of one block's normal equations and of the new maps, if blocks are fitted."""
    refits = needed(recipe) and recipe.healing.compensation == "least-squares"
    return fitted_bytes(ModelSizes.of(config), recipe.pruning, refits) if refits or recipe.pruning.distil else 0


@dataclass(frozen=True)
class Memory:
    """RAM of the machine, or of its cgroup when that is less."""

    jobs: tuple[Job, ...] = ALL

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding about the machine, and one per job of the recipe."""
        total, free = memory()
        yield Finding(group="machine", name="memory", status="ok", detail=f"{gb(total)}, {gb(free)} of it free")
        estimate = needs(context.recipe, context.workers) if context.recipe else None
        if estimate is None or context.recipe is None:
            return
        sizes: dict[Job, float] = {"build": estimate.build, "eval": estimate.judge}
        if not gpu_count():
            sizes["serve"] = estimate.serve
        for job, size in sizes.items():
            fits = size <= total
            yield Finding(
                group="recipe",
                name=f"memory to {job}",
                status="ok" if fits else "missing",
                detail=f"{context.recipe.name} takes about {gb(size)}; this machine has {gb(total)}, {gb(free)} free",
                mend=None if fits else f"{job} it on a machine with {gb(size)} of memory",
                needed_by=(job, "demo"),
            )


@dataclass(frozen=True)
class Disk:
    """Free space where the bundle goes."""

    jobs: tuple[Job, ...] = ("build", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line."""
        place = next(folder for folder in (context.out.absolute(), *context.out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        estimate = needs(context.recipe) if context.recipe else None
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
