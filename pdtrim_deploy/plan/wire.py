"""Dtypes of KV on the wire, and the exact bytes of packed rows. Pure arithmetic: no torch.

Every quantised row is self-contained: its bytes have everything needed to decode it, so the bytes of a prompt do not
depend on how it was cut into chunks. `kvcache/codecs/` defines the values, `kvcache/layout.py` their order.

A wire dtype gives K and V each a *code*. Keys decide which tokens attention reads and tolerate less error than values
(measured: `make bench-wire`), so k4v3 sends keys in 4 bits and values in 3. Prompt position 0, the attention sink,
differs in magnitude from all other rows and is read by every query: under int4 and int3 it travels native.

A model with latent attention (MLA) has no K and V but one row of its rope key and one of its latent a token, for all
heads: they travel as K and V would, in codes of `LATENT_SIDES`. The rope key is a ninth of the numbers, and its error
goes into every head's scores, so that int4 and int3 leave it 8 bits (docs/explanation/latents.md). Both travel in
halves with scales of their own, so that a layer's bytes are a multiple of 4.

Rows of an fp8 pool (SGLang's `--kv-cache-dtype`) travel native in their own byte a value. fp8 and int8 would add
scales to as many bytes and round once more, so plans refuse them (`SMALLER_THAN_FP8` are the others).
"""

from __future__ import annotations

from math import gcd
from typing import Literal, NamedTuple, get_args

Code = Literal["native", "fp8", "int8", "int4", "int3"]
CODES: tuple[Code, ...] = get_args(Code)
WireDtype = Literal["native", "fp8", "int8", "int4", "k4v3", "int3"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
SIDES: dict[WireDtype, tuple[Code, Code]] = {
    "native": ("native", "native"),
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int4"),
    "k4v3": ("int4", "int3"),
    "int3": ("int3", "int3"),
}  # codes of K and of V
LATENT_SIDES: dict[WireDtype, tuple[Code, Code]] = {
    "native": ("native", "native"),
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "int4": ("int8", "int4"),
    "int3": ("int8", "int3"),
}  # codes of a rope key and of its latent
SINK_ROWS: dict[Code, int] = {"native": 0, "fp8": 0, "int8": 0, "int4": 1, "int3": 1}  # first prompt rows sent native
ITEM_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip
PoolDtype = Literal["native", "fp8_e4m3", "fp8_e5m2"]  # native: the dtype that the model computes in
FP8_ROWS: dict[PoolDtype, str] = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}  # torch's names
SMALLER_THAN_FP8: tuple[WireDtype, ...] = ("native", "int4", "k4v3", "int3")
ROTATED: tuple[Code, ...] = ("int4", "int3")  # a head's channels are spread over each other before they are rounded
ROTATED_GROUP = 64
# So that float16 scales are aligned, and every layer's bytes are a multiple of 4.
HEAD_DIM_MULTIPLE: dict[WireDtype, int] = {"native": 1, "fp8": 2, "int8": 2, "int4": 4, "k4v3": 32, "int3": 32}


class Vectors(NamedTuple):
    """Of a token's K (or V) in one layer: `heads` vectors of `dim` values, each with scales of its own."""

    heads: int
    dim: int


class Section(NamedTuple):
    """One kind of value in packed rows: its dtype, and how many there are for each KV head."""

    dtype: str
    per_head: int


def rotated_group(head_dim: int) -> int:
    """Channels that share one scale of int4 or int3: 64, or the largest power of two that divides `head_dim`."""
    return gcd(head_dim, ROTATED_GROUP)


def row_sections(code: Code, native: str, head_dim: int) -> tuple[Section, ...]:
    """What one token's K (or V) of one KV head consists of, in the order of the sections of packed rows."""
    if code == "native":
        return (Section(native, head_dim),)
    if code in ROTATED:
        codes = head_dim * int(code[-1]) // 8
        return Section("uint8", codes), Section("float16", head_dim // rotated_group(head_dim))
    return Section("int8" if code == "int8" else "float8_e4m3fn", head_dim), Section("float16", 1)


def packed_row_bytes(code: Code, native: str, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one token's K (or V) of one layer as packed, scales included; not of a row that travels native."""
    return num_kv_heads * sum(ITEM_BYTES[s.dtype] * s.per_head for s in row_sections(code, native, head_dim))


def packed_bytes(wire_dtype: WireDtype, native: str, num_kv_heads: int, head_dim: int, rows: int, first: bool) -> int:
    """Bytes of K and V of `rows` rows of one layer; `first`: prompt position 0 is among them."""
    return sum(side_bytes(code, native, Vectors(num_kv_heads, head_dim), rows, first) for code in SIDES[wire_dtype])


def side_bytes(code: Code, native: str, vectors: Vectors, rows: int, first: bool) -> int:
    """The same of K, or of V, alone."""
    sinks = min(rows, SINK_ROWS[code]) if first else 0
    exact, packed = (packed_row_bytes(which, native, *vectors) for which in ("native", code))
    return sinks * exact + (rows - sinks) * packed
