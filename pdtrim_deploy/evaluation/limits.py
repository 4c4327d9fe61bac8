"""What `--memory` and `--device-memory` mean for judging a bundle: blocks in memory, and bytes of prompt KV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.footprint import (
    LOGITS,
    Peak,
    can_stream,
    choose_limits,
    gb,
    read_ahead,
    read_bytes,
    weight_bytes,
)
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan.wire import ITEM_BYTES

STREAMED_KV = 1 << 30  # bytes of prompt KV side by side where blocks are read as they run


def fit_judging(groups: Sequence[Sequence[Path]], tokens: int, compute: Compute) -> Compute:
    """`compute` with limits by which models of these folders fit into the memory that it allows.

    Args:
        groups: folders of models; those of a group are in memory together.
        tokens: whose KV is in memory at a time, at least: of prompts and what follows them.
        compute: as the command has it.

    Raises:
        UserError: not even one block of each model at a time fits.

    """
    configs = [[read_config(folder / "config.json") for folder in group] for group in groups]
    sizes = [[ModelSizes.of(config) for config in group] for group in configs]
    item = ITEM_BYTES[compute.dtype]  # type: ignore[index]

    def needs(limited: Compute) -> Peak:
        weights = [
            sum(weight_bytes(config, compute.dtype, limited.blocks_in_memory) for config in group) for group in configs
        ]
        ahead = 0.0
        if limited.blocks_in_memory is not None:  # of each model
            ahead = max(sum(read_ahead(config, limited) for config in group) for group in configs)
        rows = [max(2 * size.kv_width * size.blocks for size in group) for group in sizes]
        kv = [3 * item * tokens * row for row in rows]
        if limited.blocks_in_memory is not None:
            kv = [max(size, limited.states(STREAMED_KV)) for size in kv]
        running = max(tokens * (6 * size.hidden + 3 * size.inner) * item for group in sizes for size in group)
        peaks = [weight + held + running + LOGITS for weight, held in zip(weights, kv, strict=True)]
        return Peak.of(limited, max(peaks) + ahead, reading=read_bytes(configs[0][0]) + ahead)

    def refused(least: Peak) -> str:
        names = " and ".join(str(folder) for folder in groups[0])
        device = f" and {gb(least.device)} on the devices" if least.device else ""
        return (
            f"judging {names} needs at least {gb(least.host)} of host memory{device}, with one block of each model "
            "at a time where blocks can be read as they run; give more --memory or --device-memory"
        )

    most = max(size.blocks for group in sizes for size in group)
    streams = all(can_stream(config) for group in configs for config in group)
    return choose_limits(compute, most, STREAMED_KV, needs, refused, streams)
