"""Measure key offsets (`kvcache/key_offsets.py`): the mean of keys before RoPE, where subtracting it helps.

The keys of prefill's KV are rotated back, so this needs to know nothing of a model family but its RoPE. A head gets
zeros if its mean does not lower the error on held-out text, or is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, rotary_table, rotate
from pdtrim_deploy.kvchoice.base import Progress
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, Code, row_sections

STATIC = ("default", "linear", "llama3", "yarn")  # RoPE types whose angles depend on the position alone
WORTH = 0.98  # share of the squared error that must remain at most, else a mean is not worth its arithmetic
KEPT_BACK = 4  # one sequence in so many is held out, to test whether a mean helps
FIRST = 1  # rows left out of the mean: the attention sink differs in magnitude
FAR = 4096  # positions up to which our rotation is compared with the model's
TOLERANCE = 1e-5


class Rotary(NamedTuple):
    """As in `KeyOffsets`."""

    frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class Measured:
    """`offsets`: None if no head has one; `errors`: RMS error of int4 on held-out keys, by layer of decode.

    Each entry is `[kv_heads]` pairs: without and with the mean subtracted.
    """

    offsets: KeyOffsets | None
    errors: tuple[tuple[tuple[float, float], ...], ...]


def rotary_of(model: Any, head_dim: int) -> Rotary | None:
    """The rotation of a transformers model's keys; None if it is not the same for all keys of a position.

    That is a RoPE whose angles depend on the length or the layer, that rotates a part of a head, or neighbours.
    """
    module: Any = getattr(model.model, "rotary_emb", None)
    frequencies = getattr(module, "inv_freq", None)
    if getattr(module, "rope_type", None) not in STATIC or frequencies is None or 2 * len(frequencies) != head_dim:
        return None
    rotary = Rotary(frequencies.float().cpu(), float(getattr(module, "attention_scaling", 1.0)))
    positions = torch.arange(FAR)
    where = frequencies.device
    model_angles = torch.cat(module(torch.zeros(1, device=where), position_ids=positions[None].to(where)), -1)[0].cpu()
    cos, sin = rotary_table(positions, *rotary).chunk(2, -1)
    our_angles = torch.cat((cos, cos, sin, sin), -1)
    return (
        rotary
        if model_angles.shape == our_angles.shape
        and (model_angles - our_angles).abs().max() < TOLERANCE * rotary.scaling
        else None
    )


@torch.no_grad()
def measure(oracle: PDOracle, sequences: Tensor, progress: Progress) -> Measured:
    """Offsets for the layers of `oracle`'s decode stage, from text int64 `[S, T]`, T >= 4."""
    model, layers = oracle.plan.model, len(oracle.plan.kv)
    rotary = rotary_of(oracle.prefill_model, model.head_dim)
    if rotary is None:
        progress("key offsets: none, because they do not support this model's type of RoPE")
        return Measured(None, ())
    if len(sequences) == 1:
        sequences = sequences[:, : sequences.shape[1] // 2 * 2].view(2, -1)
    back = max(1, len(sequences) // KEPT_BACK)
    total, count = torch.zeros(layers, model.num_kv_heads, model.head_dim, dtype=torch.float64), 0
    table = rotary_table(torch.arange(sequences.shape[1]), *rotary)[FIRST:]
    cos, sin = (part[:, None] for part in table.chunk(2, -1))
    for state in _states(oracle, sequences[:-back], progress, "key offsets: means"):
        for layer, keys in enumerate(_keys(oracle, state)):
            total[layer] += rotate(keys.float(), cos, -sin).sum(0, dtype=torch.float64)
        count += len(table)
    means = (total / count / rotary.scaling**2).float()
    squares = torch.zeros(layers, model.num_kv_heads, 2, dtype=torch.float64)
    for state in _states(oracle, sequences[-back:], progress, "key offsets: errors"):
        for layer, keys in enumerate(_keys(oracle, state)):
            squares[layer, :, 0] += _squares(keys, None)
            squares[layer, :, 1] += _squares(keys, rotate(means[layer], cos, sin))
    helps = squares[..., 1] < WORTH * squares[..., 0]
    chosen = {layer: means[layer] * helps[layer, :, None] for layer in range(layers) if helps[layer].any()}
    rms = (squares / (back * len(table) * model.head_dim)).sqrt()
    errors = tuple(tuple((without, with_offsets) for without, with_offsets in heads) for heads in rms.tolist())
    progress(f"key offsets: help {int(helps.sum())} of {helps.numel()} KV heads")
    return Measured(KeyOffsets.make(chosen, *rotary) if chosen else None, errors)


def _states(oracle: PDOracle, sequences: Tensor, progress: Progress, name: str) -> Iterator[PrefillState]:
    """Prefill one sequence at a time, so that only its KV is in memory."""
    for number, row in enumerate(sequences.split(1), 1):
        yield oracle.prefill(row)
        progress(f"{name}: {number}/{len(sequences)} sequences")


def _keys(oracle: PDOracle, state: PrefillState) -> Iterator[Tensor]:
    """Keys of each layer of decode in the pool's dtype, `[tokens - FIRST, kv_heads, head_dim]`, on the host."""
    for source in oracle.plan.layer_map:
        yield state.keys[source][FIRST:].cpu()


def _squares(keys: Tensor, less: Tensor | None) -> Tensor:
    """float64 `[kv_heads]`: squared error of keys in int4, or in int8 if the head size does not allow int4."""
    rows, heads, dim = keys.shape
    code: Code = "int4" if dim % HEAD_DIM_MULTIPLE["int4"] == 0 else "int8"
    sections = [
        torch.empty(rows, heads, kind.per_head, dtype=getattr(torch, kind.dtype))
        for kind in row_sections(code, "float32", dim)
    ]
    codec = get_codec(code)
    codec.encode(keys, slice(0, rows), sections, less)
    back = codec.decode(sections) if less is None else codec.decode(sections) + less
    return (back.to(keys.dtype).float() - keys.float()).square().sum((0, 2), dtype=torch.float64)
