"""Key offsets: the constant part of a layer's keys, which both ends know and which therefore need not travel.

Keys before RoPE are, per layer and KV head, a constant (the bias of the K projection and a mean besides) plus a rest
that may be far smaller; a scale that must hold both rounds the rest coarsely. The constant, rotated to a row's absolute
prompt position, is subtracted before quantising and added after. Rows that travel native have no offset, nor has prompt
position 0: the attention sink's key is no neighbour of the mean, and every query reads it.

Means and what RoPE needs lie in one file beside both stage checkpoints; the plan holds its SHA-256. Prefill and decode
add and subtract the same numbers whatever they are: a wrong mean costs precision, different ones would be wrong text.
So every form works in float32 in one order, without fused multiply-adds:

    offset[i]        = mean[i] * cos[i] - mean[half + i] * sin[i]
    offset[half + i] = mean[half + i] * cos[i] + mean[i] * sin[i]        i < half = head_dim / 2
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.layout import LayerRows, Part

if TYPE_CHECKING:
    from pdtrim_deploy.plan import KeyOffsetsFile, PDPlan

LEAST_POSITIONS = 1024


class KeyOffsets:
    """Offsets of some layers of decode, on one device. Threads may share it.

    Attributes:
        means: by layer of decode, float32 `[kv_heads, head_dim]`, before RoPE.
        frequencies: float32 `[head_dim / 2]`, RoPE's angle a position; on the CPU.
        scaling: factor of cosines and sines (yarn's attention factor; else 1).
        data: bytes of the file; the same whatever heads and device.

    """

    def __init__(self, means: Mapping[int, Tensor], frequencies: Tensor, scaling: float, data: bytes) -> None:
        self.means, self.frequencies, self.scaling, self.data = dict(means), frequencies, scaling, data
        self._tables = [torch.empty(0, 2 * len(frequencies))]  # all: a kernel of another stream may still read one
        self._lock = threading.Lock()
        self._elsewhere: dict[torch.device, KeyOffsets] = {}

    @classmethod
    def make(cls, means: Mapping[int, Tensor], frequencies: Tensor, scaling: float) -> KeyOffsets:
        """From what was measured; `means` of one layer at least."""
        frequencies, stacked = frequencies.float().contiguous(), torch.stack([means[k] for k in sorted(means)]).float()
        factor = torch.tensor([scaling], dtype=torch.float32)
        from safetensors.torch import save  # only a file needs it: kernels are checked with torch alone

        data = save({"means": stacked, "frequencies": frequencies, "scaling": factor})
        return cls(dict(zip(sorted(means), stacked, strict=True)), frequencies, float(factor), data)

    @classmethod
    def read(cls, folder: Path, plan: PDPlan) -> KeyOffsets | None:
        """Those of a stage checkpoint, of all KV heads, on the CPU; None when its plan has none.

        Raises:
            UserError: the file is missing or not the plan's.

        """
        if plan.key_offsets is None:
            return None
        from pdtrim_deploy.plan.kv import KEY_OFFSETS

        path, again = folder / KEY_OFFSETS, "copy it from the bundle that the plan is of, or build the bundle again"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the plan's key offsets cannot be read ({error.strerror}); {again}") from None
        if (digest := hashlib.sha256(data).hexdigest()) != plan.key_offsets.sha256:
            raise UserError(f"{path}: has SHA-256 {digest}, the plan's is {plan.key_offsets.sha256}; {again}")
        layers, model = plan.key_offsets.layers, plan.model
        try:
            from safetensors.torch import load

            tensors = load(data)
            means, frequencies = tensors["means"].float(), tensors["frequencies"].float()
            scaling = float(tensors["scaling"])
        except Exception:  # safetensors raises its own, a name that is missing KeyError
            raise UserError(f"{path}: is not a file of key offsets; {again}") from None
        if means.shape != (len(layers), model.num_kv_heads, model.head_dim) or len(frequencies) * 2 != model.head_dim:
            raise UserError(f"{path}: has means of {tuple(means.shape)}, which are not the plan's model's; {again}")
        return cls(dict(zip(layers, means, strict=True)), frequencies, scaling, data)

    @property
    def file(self) -> KeyOffsetsFile:
        """How a plan names it."""
        from pdtrim_deploy.plan import KeyOffsetsFile  # whoever has a plan has pydantic, which kernels do without

        return KeyOffsetsFile(sha256=hashlib.sha256(self.data).hexdigest(), layers=tuple(sorted(self.means)))

    @property
    def device(self) -> torch.device:
        """Where the means are."""
        return next(iter(self.means.values())).device

    def heads(self, heads: range) -> KeyOffsets:
        """Those of a range of these KV heads; cosines and sines are shared."""
        means = {layer: mean[heads.start : heads.stop].contiguous() for layer, mean in self.means.items()}
        part = KeyOffsets(means, self.frequencies, self.scaling, self.data)
        part._tables, part._lock = self._tables, self._lock
        return part

    def to(self, device: torch.device) -> KeyOffsets:
        """The same on a device; made once."""
        if device == self.device:
            return self
        with self._lock:
            if device not in self._elsewhere:
                means = {layer: mean.to(device) for layer, mean in self.means.items()}
                self._elsewhere[device] = KeyOffsets(means, self.frequencies, self.scaling, self.data)
            return self._elsewhere[device]

    def table(self, positions: int) -> Tensor:
        """float32 `[at least positions, head_dim]`: cosines, then sines, of each position's angles, times `scaling`.

        Of position 0 all zeros, and so is its offset. Angles are products in float32, as models make them. The table
        grows as longer prompts come.
        """
        if len(self._tables[-1]) < positions:
            with self._lock:
                if len(self._tables[-1]) < positions:
                    size = max(LEAST_POSITIONS, 1 << (positions - 1).bit_length())
                    table = rotary_table(torch.arange(size), self.frequencies, self.scaling)
                    table[0] = 0
                    self._tables.append(table.to(self.device))
        return self._tables[-1]


def rotary_table(positions: Tensor, frequencies: Tensor, scaling: float) -> Tensor:
    """float32 `[positions, 2 * frequencies]`: cosines, then sines."""
    angles = (positions.float()[:, None] * frequencies.float()).double()
    return (torch.cat((angles.cos(), angles.sin()), 1) * scaling).float()


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of `[.., head_dim]`; `cos` and `sin` `[.., head_dim / 2]`."""
    low, high = keys.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class PartOffset(NamedTuple):
    """What rows of one part travel less: float32 `mean` `[kv_heads, head_dim]` turned by `table` at `positions`."""

    mean: Tensor
    table: Tensor
    positions: Tensor

    def rows(self, at: slice) -> Tensor:
        """float32 `[rows, kv_heads, head_dim]` of some of the rows."""
        cos, sin = self.table[self.positions[at]][:, None].chunk(2, -1)
        return rotate(self.mean, cos, sin)


def part_mean(
    rows: LayerRows, side: int, part: Part, heads: tuple[int, ...], offsets: KeyOffsets | None
) -> Tensor | None:
    """float32 `[kv_heads, head_dim]` of a part of K (`side` 0) whose keys travel less an offset; else None.

    Raises:
        ValueError: there is none for this layer, or of other heads than the pool's `heads`, `(kv_heads, head_dim)`.

    """
    if side or part.code == "native" or not rows.key_offset:
        return None
    mean = None if offsets is None else offsets.means.get(rows.decode_layer)
    if mean is None or mean.shape != heads:
        has = "none was given" if mean is None else f"the one given is of {tuple(mean.shape)}"
        raise ValueError(f"keys of decode layer {rows.decode_layer} travel less an offset of {tuple(heads)}; {has}")
    return mean


def part_offset(rows: LayerRows, side: int, part: Part, pool: Tensor, offsets: KeyOffsets | None) -> PartOffset | None:
    """What a part travels less; None when it travels whole.

    Raises:
        ValueError: as `part_mean`.

    """
    mean = part_mean(rows, side, part, pool.shape[1:], offsets)
    if mean is None or offsets is None:
        return None
    every = torch.cat([torch.arange(lo, hi, device=pool.device) for lo, hi in rows.positions])
    return PartOffset(mean, offsets.table(rows.positions[-1][1]), every[part.first :][: part.rows])
