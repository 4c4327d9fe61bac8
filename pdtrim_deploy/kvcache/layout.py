"""Where the rows of one chunk of a prompt lie in the packed bytes.

    packed = layers in the order of decode layers, each in its own wire dtype, without gaps
    layer  = parts: K's and V's row of prompt position 0, native, under int4 and int3; then K's other rows, and V's
    part   = sections, one after the other (`pdtrim_deploy.plan.wire.row_sections`):
        native  [rows, kv_heads, head_dim]      the pool's dtype
        int8    [rows, kv_heads, head_dim]      int8,          [rows, kv_heads] float16 scales
        fp8     [rows, kv_heads, head_dim]      float8_e4m3fn, [rows, kv_heads] float16 scales
        int4    [rows, kv_heads, head_dim/2]    uint8,         [rows, kv_heads, groups] float16 scales
        int3    [rows, kv_heads, head_dim*3/8]  uint8,         [rows, kv_heads, groups] float16 scales

Of a model with latents (MLA) a token's rope key stands in the place of K and its latent in that of V, each in two
halves, which are what is called heads here, and in codes of their own (`plan.wire.LATENT_SIDES`).

All is little-endian and C-contiguous; codes of all rows come first, then scales of all rows, as in the CUDA kernel's
`wire_format.h`. There is no padding, since bytes would then depend on how a prompt is cut, and none is needed: a part
is a multiple of 2 bytes (`plan.wire.HEAD_DIM_MULTIPLE`) and a layer of 4, so in a buffer aligned to 4 bytes
every section may be viewed in its dtype, whatever the wire dtypes of the layers before it.

Rows are chosen by absolute prompt position, so chunked prefill, prefix-cache hits, page sizes and batches change
nothing: the chunks of a prompt, however it is cut, carry exactly the rows of the whole. Pure arithmetic: no torch.

Of an earlier prompt with the same first tokens decode may still have their rows in its full layers, so these travel
from there on. A cut layer's rows are each request's alone, and all of them travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.wire import SINK_ROWS, Code, Vectors, WireDtype, packed_row_bytes


class Part(NamedTuple):
    """Rows `[first, first + rows)` of a layer's rows, of K or V, in one code: `bytes` from byte `offset` on."""

    code: Code
    first: int
    rows: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class LayerRows:
    """The rows of one KV layer of decode in a chunk.

    Attributes:
        decode_layer, prefill_layer: KV layers of the two stages, which are the layers of their pools.
        ranges: half-open ranges of rows, relative to the chunk's first token, ascending and disjoint.
        positions: the same ranges as absolute prompt positions.
        rows: their number.
        offset, bytes: where the layer lies.
        keys, values: their parts, one or two each.
        key_offset: whether quantised keys travel less a constant (`kvcache/key_offsets.py`).

    """

    decode_layer: int
    prefill_layer: int
    ranges: tuple[tuple[int, int], ...]
    positions: tuple[tuple[int, int], ...]
    rows: int
    wire_dtype: WireDtype
    offset: int
    bytes: int
    keys: tuple[Part, ...]
    values: tuple[Part, ...]
    key_offset: bool

    @property
    def sides(self) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """Parts of K, parts of V."""
        return self.keys, self.values


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Packed layout of prompt tokens `[start, stop)` of a prompt of `prompt_tokens`; layers without rows are absent.

    `has_last` says whether it is to hold the last layer: what travels beside the plan's rows goes with that one.
    It is hashed by identity: `chunk_layout` returns the same object again, and tables are cached by it.
    """

    prompt_tokens: int
    start: int
    stop: int
    layers: tuple[LayerRows, ...]
    total_bytes: int
    has_last: bool = True


@lru_cache(maxsize=1024)
def chunk_layout(
    plan: PDPlan,
    prompt_tokens: int,
    start: int = 0,
    stop: int | None = None,
    kv_heads: int | None = None,
    layers: range | None = None,
    reused_tokens: int = 0,
) -> ChunkLayout:
    """Lay out one chunk.

    Args:
        start, stop: absolute prompt positions, half-open; the whole prompt when left out.
        kv_heads: KV heads held by this rank; all of the model's when left out.
        layers: the KV layers of decode whose rows it holds; all when left out.
        reused_tokens: of the prompt's first tokens so many have their rows in decode's full layers already.

    Raises:
        ValueError: the chunk does not lie inside the prompt.

    """
    stop = prompt_tokens if stop is None else stop
    if not 0 <= start <= stop <= prompt_tokens:
        raise ValueError(f"chunk [{start}, {stop}) does not lie in a prompt of {prompt_tokens} tokens")
    model, offset, parts = plan.model, 0, list[LayerRows]()
    vectors = model.vectors(kv_heads)
    for layer, (source, send) in enumerate(zip(plan.layer_map, plan.kv, strict=True)):
        if layers is not None and layer not in layers:
            continue
        begin = max(start, reused_tokens) if send.mode == "full" else start
        clipped = ((max(lo, begin) - start, min(hi, stop) - start) for lo, hi in send.row_ranges(prompt_tokens))
        ranges = tuple((lo, hi) for lo, hi in clipped if lo < hi)
        rows = sum(hi - lo for lo, hi in ranges)
        if not rows:
            continue
        codes, first = model.codes(send.wire_dtype), start + ranges[0][0] == 0
        keys, values = _parts(codes, vectors, model.row_dtype, rows, first, offset)
        size = sum(part.bytes for part in (*keys, *values))
        positions = tuple((start + lo, start + hi) for lo, hi in ranges)
        parts.append(
            LayerRows(
                layer, source, ranges, positions, rows, send.wire_dtype, offset, size, keys, values,
                plan.has_key_offset(layer),
            )
        )  # fmt: skip
        offset += size
    has_last = layers is None or len(plan.kv) - 1 in layers
    return ChunkLayout(prompt_tokens, start, stop, tuple(parts), offset, has_last)


def _parts(
    codes: tuple[Code, Code], vectors: tuple[Vectors, Vectors], native: str, rows: int, first: bool, offset: int
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Parts of K and of V of `rows` rows; `first`: prompt position 0 is among them."""
    sides: tuple[list[Part], list[Part]] = [], []
    sinks = [SINK_ROWS[code] if first else 0 for code in codes]
    for side, of_side, count in zip(sides, vectors, sinks, strict=True):
        side.append(Part("native", 0, count, offset, count * packed_row_bytes("native", native, *of_side)))
        offset += side[0].bytes
    for side, of_side, count, code in zip(sides, vectors, sinks, codes, strict=True):
        packed = (rows - count) * packed_row_bytes(code, native, *of_side)
        side.append(Part(code, count, rows - count, offset, packed))
        offset += packed
    keys, values = (tuple(part for part in side if part.rows) for side in sides)
    return keys, values
