"""Whole models where a command computes. No more of one is on the host than a block, unless it stays there.

A model whose blocks are not known is there as a whole before it moves to GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.checkpoint import Checkpoint, read_checkpoint
from pdtrim_deploy.models.footprint import can_stream
from pdtrim_deploy.models.loading import TORCH_DTYPES, cast_weights, load_model
from pdtrim_deploy.models.placement import put
from pdtrim_deploy.models.quantized.inputs import round_inputs
from pdtrim_deploy.models.streaming import own_weights, stream_model

Note = Callable[[str], None]


def load_on(checkpoint: Checkpoint, compute: Compute, note: Note = lambda _: None, rounded: str | None = None) -> Any:
    """`load_model`, on `compute.devices` and in its dtype; weights are `rounded` to that dtype first, if any.

    Where `compute` has fewer blocks in memory than there are, they come from the checkpoint as they run. `note` hears
    how far it is.
    """
    if compute.streams(checkpoint.facts.num_blocks):
        assert compute.blocks_in_memory is not None
        note(f"reading blocks from the checkpoint, {compute.blocks_in_memory} in memory at a time")
        return stream_model(checkpoint, compute.blocks_in_memory, compute, rounded)[0]
    if not compute.on_gpu:
        return cast_weights(load_model(checkpoint.path, rounded or compute.dtype), TORCH_DTYPES[compute.dtype])
    if not can_stream(checkpoint.config):
        whole = cast_weights(load_model(checkpoint.path, rounded or compute.dtype), TORCH_DTYPES[compute.dtype])
        return _spread(whole, compute)
    model, _ = stream_model(checkpoint, 1, compute, rounded)
    for block, layer in enumerate(model.model.layers, 1):
        own_weights(layer)
        note(f"loading block {block}/{len(model.model.layers)}")
    return model


def _spread(model: Any, compute: Compute) -> Any:
    """A model of the host, moved: blocks to their devices, all else to the first."""
    home, layers = torch.device(compute.devices[0]), model.model.layers
    for block, layer in enumerate(layers):
        device = torch.device(compute.device_of(block, len(layers)))
        put(layer.to(device), device)
    for part in (*(part for part in model.model.children() if part is not layers), model.lm_head):
        part.to(home)
    return model


def load_to_compute(
    name: str,
    path: Path,
    dtype: str,
    note: Note = lambda _: None,
    compute: Compute | None = None,
    *,
    rounds_inputs: bool = False,
) -> Any:
    """The model of a folder for whoever only judges: weights rounded to `dtype`, arithmetic as `compute` says.

    By default that is this CPU, in what it is fast at. `note` hears that the `name` model is being loaded;
    `rounds_inputs` as in `load_model`.
    """
    compute = ON_CPU.fast(dtype) if compute is None else compute
    emulated = not compute.on_gpu and compute.dtype == ON_CPU.fast(dtype).dtype != dtype
    why = f": this CPU has no {dtype} instructions, it computes in {compute.dtype}" if emulated else ""
    note(f"loading the {name} model{why}")
    checkpoint = read_checkpoint(path)
    if not (compute.on_gpu or compute.streams(checkpoint.facts.num_blocks)):
        return cast_weights(load_model(path, dtype, rounds_inputs=rounds_inputs), TORCH_DTYPES[compute.dtype])
    model = load_on(checkpoint, compute, lambda line: note(f"{name}: {line}"), dtype)
    if rounds_inputs and checkpoint.quantized is not None:
        round_inputs(model, checkpoint.quantized, checkpoint.tensors)
    return model
