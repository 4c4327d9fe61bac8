"""Bytes that a model's weights take in memory while it runs, whole or block by block: from config.json. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan.wire import ITEM_BYTES

PROGRAM = 0.5e9  # Python, torch and transformers with a tokenizer, measured (tests/pipeline/test_step_costs.py)
GPU_PROGRAM = 2.5e9  # the same with CUDA's libraries: not measured
GPU_CONTEXT = 0.6e9  # of each GPU, before a weight is there: not measured
LOGITS = 3 * 4 * (1 << 24)  # bytes of a slice of logits, its log-softmax and a copy
_LOADING = 1.1  # times a whole model's weights, while transformers loads it


def weight_bytes(config: Mapping[str, Any], dtype: str, blocks_in_memory: int | None = None) -> float:
    """Of a model that computes in `dtype`: all its weights, or those of so many blocks and what is outside blocks."""
    sizes, item = ModelSizes.of(config), ITEM_BYTES[dtype]  # type: ignore[index]
    if blocks_in_memory is None or blocks_in_memory >= sizes.blocks:
        return _LOADING * sizes.total * item
    return item * (sizes.ends + blocks_in_memory * sizes.block) + read_bytes(config)


def can_stream(config: Mapping[str, Any]) -> bool:
    """Whether blocks of the model can be read as they run: they are known, and the family does not refuse it."""
    family = known_family((config.get("architectures") or [""])[0])
    return family.blocks is not None and family.refusal("blocks_in_memory") is None


def read_bytes(config: Mapping[str, Any]) -> float:
    """On the host, of the tensor of a block that is being read, as it is stored: float32 at most.

    Experts lie apart on disk and are stacked: their parts are there beside the stack.
    """
    sizes = ModelSizes.of(config)
    dense, experts = sizes.hidden * max(sizes.inner, sizes.hidden), 0
    if sizes.expert_tokens < 1:  # all but the attention, of which two thirds are one stacked parameter
        experts = 2 * 2 * sizes.block // 3
    return 4.0 * max(dense, experts)


def read_ahead(config: Mapping[str, Any], compute: Compute) -> float:
    """Bytes of the block that is read while another computes (`prefetch`): on GPUs alone."""
    return float(ITEM_BYTES[compute.dtype] * ModelSizes.of(config).block) if compute.on_gpu else 0.0  # type: ignore[index]


@dataclass(frozen=True)
class Peak:
    """Bytes at a time: on the host, and on all devices together; 0 where the host is the device."""

    host: float
    device: float = 0.0

    @classmethod
    def of(cls, compute: Compute, computing: float, host: float = 0.0, reading: float = 0.0) -> Peak:
        """Of a step that needs `computing` where the model runs, and `host` on the host in any case.

        On GPUs the host has `reading` besides: a tensor on its way to them.
        """
        if not compute.on_gpu:
            return cls(PROGRAM + computing + host)
        return cls(GPU_PROGRAM + host + reading, computing + GPU_CONTEXT * len(compute.devices))

    def fits(self, compute: Compute) -> bool:
        """Whether `compute` allows so much."""
        host, device = compute.host_bytes, compute.device_bytes
        return (host is None or self.host <= host) and (device is None or self.device <= device)


def gb(count: float) -> str:
    """1.5e9 -> `1.5 GB`."""
    return f"{count / 1e9:,.1f} GB"


LEAST_STATES = 16 << 20


def fit_one_model(config: Mapping[str, Any], tokens: int, compute: Compute, name: str) -> Compute:
    """`compute` with limits by which one model fits, through which `tokens` tokens go at a time.

    Raises:
        UserError: nothing fits.

    """
    sizes, item = ModelSizes.of(config), ITEM_BYTES[compute.dtype]  # type: ignore[index]

    def needs(limited: Compute) -> Peak:
        weights = weight_bytes(config, compute.dtype, limited.blocks_in_memory)
        states = item * tokens * (4 * sizes.hidden + 3 * sizes.inner)
        ahead = read_ahead(config, limited)  # on the host, and on the device where blocks come and go
        weights += ahead if limited.streams(sizes.blocks) else 0.0
        return Peak.of(limited, weights + states, reading=read_bytes(config) + ahead)

    def refused(least: Peak) -> str:
        return f"{name} needs at least {gb(least.host)} of memory, one block at a time; give more --memory"

    return choose_limits(compute, sizes.blocks, 0, needs, refused, can_stream(config))


def choose_limits(
    compute: Compute,
    blocks: int,
    states: int,
    needs: Callable[[Compute], Peak],
    refused: Callable[[Peak], str],
    streams: bool = True,
) -> Compute:
    """`compute` with as many blocks in memory as its bytes allow; hidden states shrink where one block is too much.

    Args:
        blocks: of the model.
        states: bytes of states kept or side by side by default.
        needs: the peak of all that is to run.
        refused: the sentence where nothing fits, of the least peak.
        streams: whether blocks of the model can be read as they run.

    Raises:
        UserError: nothing fits.

    """
    if compute.host_bytes is None and compute.device_bytes is None:
        return compute
    most = min(blocks, compute.blocks_in_memory or blocks)
    least = 1 if streams else most
    tried = [compute.with_blocks(None if count == blocks else count) for count in range(most, least - 1, -1)]
    while states > LEAST_STATES:
        states //= 2
        tried.append(tried[0 if not streams else most - 1].with_states(states))
    for limited in tried:
        if needs(limited).fits(compute):
            return limited
    raise UserError(refused(needs(tried[-1])))
