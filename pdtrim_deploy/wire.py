"""Dtypes of KV on the wire, and the exact bytes of one packed row. Pure arithmetic: no torch."""

from __future__ import annotations

from typing import Literal, get_args

WireDtype = Literal["native"]
WIRE_DTYPES: tuple[str, ...] = get_args(WireDtype)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def packed_row_bytes(wire_dtype: WireDtype, native: str, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one token's K (or V) of one layer as packed: `[num_kv_heads * head_dim]` values."""
    return num_kv_heads * head_dim * ITEM_BYTES[native]
