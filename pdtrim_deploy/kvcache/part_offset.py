"""How a part of a layer's rows uses the layer's key offset (`kvcache/key_offsets.py`), if it has one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.key_constants import KeyConstants
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, rotate
from pdtrim_deploy.kvcache.layout import LayerRows, Part


class PartOffset(NamedTuple):
    """How keys of one part travel: less the mean of `constants`, turned by `table` at `positions`; then scaled."""

    constants: KeyConstants
    table: Tensor
    positions: Tensor

    def rows(self, at: slice) -> Tensor:
        """float32 `[rows, kv_heads, head_dim]`: what some of the rows travel less."""
        cos, sin = self.table[self.positions[at]][:, None].chunk(2, -1)
        return rotate(self.constants.mean, cos, sin)


def part_constants(
    rows: LayerRows, side: int, part: Part, heads: tuple[int, ...], offsets: KeyOffsets | None
) -> KeyConstants | None:
    """Those of a part of K (`side` 0) whose keys travel less an offset; else None.

    Raises:
        ValueError: there is none for this layer, or of other heads than the pool's `heads`, `(kv_heads, head_dim)`.

    """
    if side or part.code == "native" or not rows.key_offset:
        return None
    constants = None if offsets is None else offsets.constants(rows.decode_layer, part.code)
    if constants is None or constants.mean.shape != heads:
        has = "none was given" if constants is None else f"the one given is of {tuple(constants.mean.shape)}"
        raise ValueError(f"keys of decode layer {rows.decode_layer} travel less an offset of {tuple(heads)}; {has}")
    return constants


def part_offset(rows: LayerRows, side: int, part: Part, pool: Tensor, offsets: KeyOffsets | None) -> PartOffset | None:
    """What a part travels less; None when it travels whole.

    Raises:
        ValueError: as `part_constants`.

    """
    constants = part_constants(rows, side, part, pool.shape[1:], offsets)
    if constants is None or offsets is None:
        return None
    every = torch.cat([torch.arange(lo, hi, device=pool.device) for lo, hi in rows.positions])
    return PartOffset(constants, offsets.table(rows.positions[-1][1]), every[part.first :][: part.rows])
