"""What `--memory` and `--device-memory` mean for a build: blocks in memory at a time, and bytes of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.bundle import ENGINES
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.footprint import Peak, can_stream, choose_limits, gb
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal_costs import fit_bytes
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.pipeline.step_costs import limited_recipe, step_costs
from pdtrim_deploy.pipeline.training_costs import holds_model, training_costs
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv_cost import STATES


def fit_build(recipe: Recipe, config: Mapping[str, Any], compute: Compute, *, workers: int | None = None) -> Compute:
    """`compute` in the recipe's dtype, with limits by which every step fits into the memory that it allows.

    Nothing of the result changes by them, only the time. `workers`: how many of Ray's workers search on this machine;
    None: this process searches alone.

    Raises:
        UserError: some step does not fit, or it would only without workers.

    """
    compute = compute.with_dtype(recipe.model.measured_in)
    readable, speaks = can_stream(config), recipe.calibration.continuations != "text"
    streams = readable and not speaks  # the model's own words are written by a whole model
    sizes = ModelSizes.of(config)
    blocks, states = sizes.blocks, max(recipe.pruning.memory_mb << 20, STATES)

    def needs(limited: Compute) -> Peak:
        return highest(step_costs(recipe, config, limited, workers or 0))

    def refused(least: Peak) -> str:
        tightest = compute.with_blocks(1) if streams else compute
        costs = step_costs(recipe, config, tightest, workers or 0)
        host = max(costs, key=lambda name: costs[name].peak.host)
        device = max(costs, key=lambda name: costs[name].peak.device)
        parts = [f"{gb(least.host)} of host memory (step {host})"] if _short(least.host, compute.host_bytes) else []
        if _short(least.device, compute.device_bytes):
            parts.append(f"{gb(least.device)} of device memory (step {device})")
        short = {host} if _short(least.host, compute.host_bytes) else set()
        short |= {device} if _short(least.device, compute.device_bytes) else set()
        trains = bool(short & {"heal", "heal-kv"})
        fitted = fit_bytes(limited_recipe(recipe, tightest), sizes)
        trained = training_costs(recipe, config, streams=True)
        fits = "heal" in short and fitted > max((training.memory for training in trained), default=0.0)
        why, instead = "", "give more"
        if engines := sorted(name for name in short if name.startswith(f"{ENGINES}/")):
            why = f", as the builder of {engines[0]} holds its weights"
            instead = "give more, or leave that target out and build it on a larger machine"
        elif not readable:
            why = f", as blocks of {config['architectures'][0]} cannot be read as they run"
        elif speaks:
            why = f", as calibration.continuations {recipe.calibration.continuations} holds the whole model"
            instead = "give more, or set calibration.continuations to text"
        elif workers and host == "prune" and host in short:
            why, instead = f", with {workers} of Ray's workers", "give more, or fewer workers"
        elif trains and holds_model(recipe, sizes):
            why, instead = ", as training by gradients holds the whole model", "give more, or leave healing's steps out"
            if recipe.healing.method == "full" and not sizes.has_experts:
                instead = "give more, or set healing.method to lora, which streams it"
        elif fits and recipe.healing.compensation == "least-squares":
            why = f", as least squares over {sizes.inner} features take {gb(fitted)}"
            instead = "give more, or set healing.compensation to norm, or lower healing.sequences"
        elif trains and recipe.healing.gradient_steps:
            instead = "give more, or lower healing.batch or healing.length"
        return f"recipe {recipe.name} needs at least {' and '.join(parts)}{why}, and {_allowed(compute)}; {instead}"

    limited = choose_limits(compute, blocks, states, needs, refused, streams)
    if workers is not None and limited.streams(blocks):
        raise UserError(
            f"recipe {recipe.name} fits into {_allowed(compute)} with {limited.blocks_in_memory} of {blocks} blocks in "
            "memory at a time, but Ray's workers hold whole models; build without --workers, or allow more"
        )
    return limited


def highest(costs: Mapping[str, StepCost]) -> Peak:
    """The highest of all steps."""
    peaks = [cost.peak for cost in costs.values()]
    return Peak(max(peak.host for peak in peaks), max(peak.device for peak in peaks))


def _short(needed: float, allowed: int | None) -> bool:
    return allowed is not None and needed > allowed


def _allowed(compute: Compute) -> str:
    options = (("--memory", compute.host_bytes), ("--device-memory", compute.device_bytes))
    return " and ".join(f"{name} is {gb(size)}" for name, size in options if size is not None)
