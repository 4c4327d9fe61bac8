"""Dtypes of KV on the wire, and the exact bytes of one packed row. Pure arithmetic: no torch.

Every quantised dtype is row-local: a row's bytes hold all that it takes to read it, so the bytes of a prompt do
not depend on how it was cut into chunks. What the values mean: `kvcache/codecs/`; where they lie: `kvcache/layout.py`.
"""

from __future__ import annotations

from math import gcd
from typing import Literal, NamedTuple, get_args

WireDtype = Literal["native", "fp8", "int8", "int4"]
WIRE_DTYPES: tuple[str, ...] = get_args(WireDtype)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}
INT4_GROUP = 64
# So that float16 scales are aligned, and every layer's bytes are a multiple of 4.
HEAD_DIM_MULTIPLE: dict[WireDtype, int] = {"native": 1, "fp8": 2, "int8": 2, "int4": 4}


class Section(NamedTuple):
    """One kind of value in a packed row: its dtype, and how many there are for each KV head."""

    dtype: str
    per_head: int


def int4_group(head_dim: int) -> int:
    """Channels that share one int4 scale: 64, or the largest power of two that divides `head_dim`."""
    return gcd(head_dim, INT4_GROUP)


def row_sections(wire_dtype: WireDtype, native: str, head_dim: int) -> tuple[Section, ...]:
    """What one token's K (or V) of one KV head consists of, in the order of the sections of a packed side."""
    if wire_dtype == "native":
        return (Section(native, head_dim),)
    if wire_dtype == "int4":
        return Section("uint8", head_dim // 2), Section("float16", head_dim // int4_group(head_dim))
    return Section("int8" if wire_dtype == "int8" else "float8_e4m3fn", head_dim), Section("float16", 1)


def packed_row_bytes(wire_dtype: WireDtype, native: str, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one token's K (or V) of one layer as packed, scales included."""
    return num_kv_heads * sum(ITEM_BYTES[s.dtype] * s.per_head for s in row_sections(wire_dtype, native, head_dim))
