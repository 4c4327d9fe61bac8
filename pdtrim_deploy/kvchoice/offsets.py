"""Measure key offsets (`kvcache/key_offsets.py`): the mean of keys before RoPE, and key scales, where these help.

The keys of prefill's KV are rotated back, so this needs to know nothing of a model family but its RoPE. A head gets
zeros if its mean does not lower the error on held-out text, or is not finite; and scales of 1 if others do not lower
the error of queries' products with its keys there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.codecs.base import Less
from pdtrim_deploy.kvcache.key_constants import KeyConstants
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, rotary_table, rotate
from pdtrim_deploy.kvchoice.base import Progress
from pdtrim_deploy.kvchoice.key_scales import exponents, pair_sums, query_squares
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, ROTATED, Code, row_sections
from pdtrim_deploy.recipe.kv_cost import KEPT_BACK

STATIC = ("default", "linear", "llama3", "yarn")  # RoPE types whose angles depend on the position alone
WORTH = 0.98  # share of the squared error that may remain, else a mean, or scales, are not worth their arithmetic
FIRST = 1  # rows left out of the mean: the attention sink differs in magnitude
FAR = 4096  # positions up to which our rotation is compared with the model's
TOLERANCE = 1e-5


Pairs = tuple[tuple[tuple[float, float], ...], ...]


class Rotary(NamedTuple):
    """As in `KeyOffsets`."""

    frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class Measured:
    """What was measured, on held-out text for keys in int4; of each layer of decode `[kv_heads]` pairs.

    Attributes:
        offsets: None if no head has any.
        errors: RMS error of a channel of a key, without and with the mean subtracted.
        product_errors: RMS error of a query's product with a key, less the mean where that helps: without and with key
            scales.

    """

    offsets: KeyOffsets | None
    errors: Pairs
    product_errors: Pairs


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
        return Measured(None, (), ())
    if len(sequences) == 1:
        sequences = sequences[:, : sequences.shape[1] // 2 * 2].view(2, -1)
    back = max(1, len(sequences) // KEPT_BACK)
    read, held_out = sequences[:-back], sequences[-back:]
    sums = torch.zeros(2, layers, model.num_kv_heads, model.head_dim, dtype=torch.float64)
    table = rotary_table(torch.arange(sequences.shape[1]), *rotary)[FIRST:]
    cos, sin = (part[:, None] for part in table.chunk(2, -1))
    for state in _states(oracle, read, progress, "key offsets: means"):
        for layer, keys in enumerate(_keys(oracle, state)):
            plain = rotate(keys.float(), cos, -sin)
            sums[:, layer] += torch.stack(
                [plain.sum(0, dtype=torch.float64), plain.square().sum(0, dtype=torch.float64)]
            )
    first, second = sums / (len(read) * len(table))
    first, second = first / rotary.scaling**2, second / rotary.scaling**4
    means, queries = first.float(), query_squares(oracle, read)
    powers = [exponents(queries, pair_sums(squares)) for squares in (second, second - first.square())]
    none = torch.zeros_like(powers[0][0])
    # Of keys whole and less their mean (first index), without key scales and with (second): squares of keys' errors,
    # and of products'.
    errors = torch.zeros(2, 2, layers, model.num_kv_heads, 2, dtype=torch.float64)
    for state in _states(oracle, held_out, progress, "key offsets: errors"):
        for layer, keys in enumerate(_keys(oracle, state)):
            for less, with_scales in product(range(2), range(2)):
                constants = KeyConstants.of(means[layer] * less, powers[less][layer] if with_scales else none)
                squares = _squares(keys, constants, (cos, sin))
                by_products = (pair_sums(squares) * queries[layer]).sum(-1) / 2 * rotary.scaling**2
                errors[less, with_scales, layer] += torch.stack([squares.sum(-1), by_products], -1)
    helps = errors[1, 0, ..., 0] < WORTH * errors[0, 0, ..., 0]
    of_products = torch.where(helps, errors[1, ..., 1], errors[0, ..., 1])
    scaled = (of_products[1] < WORTH * of_products[0]) & (_code(model.head_dim) in ROTATED)
    chosen = [layer for layer in range(layers) if (helps | scaled)[layer].any()]
    kept = torch.where(helps[..., None], means, 0.0)
    steps = torch.where(helps[..., None], powers[1], powers[0]) * scaled[..., None]
    progress(f"key offsets: means help {int(helps.sum())}, key scales {int(scaled.sum())} of {helps.numel()} KV heads")
    offsets = KeyOffsets.make({x: kept[x] for x in chosen}, *rotary, {x: steps[x] for x in chosen}) if chosen else None
    rows = back * len(table)
    return Measured(offsets, _pairs(errors[:, 0, ..., 0] / (rows * model.head_dim)), _pairs(of_products / rows))


def _states(oracle: PDOracle, sequences: Tensor, progress: Progress, name: str) -> Iterator[PrefillState]:
    """Prefill one sequence at a time, so that only its KV is in memory."""
    for number, row in enumerate(sequences.split(1), 1):
        yield oracle.prefill(row)
        progress(f"{name}: {number}/{len(sequences)} sequences")


def _keys(oracle: PDOracle, state: PrefillState) -> Iterator[Tensor]:
    """Keys of each layer of decode in the pool's dtype, `[tokens - FIRST, kv_heads, head_dim]`, on the host."""
    for source in oracle.plan.layer_map:
        yield state.keys[source][FIRST:].cpu()


def _squares(keys: Tensor, constants: KeyConstants, turn: tuple[Tensor, Tensor]) -> Tensor:
    """float64 `[kv_heads, head_dim]`: squared error of keys in int4, or int8 if the head size does not allow int4."""
    rows, heads, dim = keys.shape
    code = _code(dim)
    sections = [
        torch.empty(rows, heads, kind.per_head, dtype=getattr(torch, kind.dtype))
        for kind in row_sections(code, "float32", dim)
    ]
    codec, offset = get_codec(code), rotate(constants.mean, *turn)
    codec.encode(keys, slice(0, rows), sections, Less(offset, constants.scale))
    back = codec.decode(sections) * constants.inverse + offset
    return (back.to(keys.dtype).float() - keys.float()).square().sum(0, dtype=torch.float64)


def _code(head_dim: int) -> Code:
    return "int4" if head_dim % HEAD_DIM_MULTIPLE["int4"] == 0 else "int8"


def _pairs(squares: Tensor) -> Pairs:
    """`[2, layers, kv_heads]` -> roots, by layer and KV head in pairs."""
    return tuple(tuple((before, after) for before, after in heads) for heads in squares.sqrt().movedim(0, -1).tolist())
