"""Key offsets: what is constant in a layer's keys, which both ends know and which therefore need not travel.

Keys before RoPE are, per layer and KV head, a constant (the bias of the K projection and a mean besides) plus a rest
that may be far smaller; a scale that must hold both rounds the rest coarsely. The constant, rotated to a row's absolute
prompt position, is subtracted before quantising and added after. Prompt position 0 has no offset: the attention sink's
key is no neighbour of the mean, and every query reads it.

Nor do all channels of the rest matter alike: an error in a channel counts by the queries that it meets there. So what
travels is multiplied by a key scale, large where queries are large beside keys, and divided by it after. Channels i and
half + i, which RoPE turns into each other, have the same one, so it stands before RoPE as well as behind. Only int4
and int3 have scales: they give all channels of a head the same error, while fp8's follows each channel and int8's the
largest. Rows that travel native have neither.

Means, exponents of the scales and what RoPE needs lie in one file beside both stage checkpoints; the plan holds its
SHA-256. Prefill and decode use the same numbers whatever they are: a wrong one costs precision, different ones would be
wrong text. So every form works in float32 in one order, without fused multiply-adds:

    offset[i]        = mean[i] * cos[i] - mean[half + i] * sin[i]
    offset[half + i] = mean[half + i] * cos[i] + mean[i] * sin[i]        i < half = head_dim / 2
    sent             = quantised((key - offset) * scale)
    key again        = dequantised * inverse + offset
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.key_constants import MAX_EXPONENT, KeyConstants
from pdtrim_deploy.plan.wire import ROTATED, Code

if TYPE_CHECKING:
    from pdtrim_deploy.plan import KeyOffsetsFile, PDPlan

LEAST_POSITIONS = 1024


class KeyOffsets:
    """Means and key scales of some layers of decode, on one device. Threads may share it.

    Attributes:
        layers: by layer of decode.
        frequencies: float32 `[head_dim / 2]`, RoPE's angle a position; on the CPU.
        scaling: factor of cosines and sines (yarn's attention factor; else 1).
        data: bytes of the file; the same whatever heads and device, as is
        scaled: whether some key scale is not 1.

    """

    def __init__(
        self,
        layers: Mapping[int, KeyConstants],
        frequencies: Tensor,
        scaling: float,
        data: bytes = b"",
        *,
        scaled: bool = False,
    ) -> None:
        self.layers, self.frequencies, self.scaling = dict(layers), frequencies, scaling
        self.data, self.scaled = data, scaled
        self._plain = {layer: of_layer.unscaled() for layer, of_layer in self.layers.items()} if scaled else self.layers
        self._tables = [torch.empty(0, 2 * len(frequencies))]  # all: a kernel of another stream may still read one
        self._lock = threading.Lock()
        self._by_device: dict[torch.device, KeyOffsets] = {}

    @classmethod
    def make(
        cls,
        means: Mapping[int, Tensor],
        frequencies: Tensor,
        scaling: float,
        exponents: Mapping[int, Tensor] | None = None,
    ) -> KeyOffsets:
        """From what was measured, of one layer at least.

        Args:
            exponents: of the same layers, integers `[kv_heads, head_dim / 2]` within +-MAX_EXPONENT, as
                `KeyConstants.of` has them. If all are 0 the file is as if there were none.

        """
        order, frequencies = sorted(means), frequencies.float().contiguous()
        stacked = torch.stack([means[layer] for layer in order]).float()
        powers = torch.zeros(*stacked.shape[:2], stacked.shape[2] // 2, dtype=torch.int8)
        if exponents is not None:
            powers = torch.stack([exponents[layer] for layer in order]).to(torch.int8)
        factor, scaled = torch.tensor([scaling], dtype=torch.float32), bool(powers.any())
        from safetensors.torch import save  # only a file needs it: kernels are checked with torch alone

        tensors = {"means": stacked, "frequencies": frequencies, "scaling": factor}
        data = save(tensors | ({"exponents": powers} if scaled else {}))
        layers = dict(zip(order, map(KeyConstants.of, stacked, powers), strict=True))
        return cls(layers, frequencies, float(factor), data, scaled=scaled)

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
            scaling, scaled = float(tensors["scaling"]), plan.key_offsets.scaled
            powers = tensors["exponents"] if scaled else torch.zeros(*means.shape[:-1], means.shape[-1] // 2)
        except Exception:  # safetensors raises its own, a name that is missing KeyError
            raise UserError(f"{path}: is not a file of key offsets; {again}") from None
        if means.shape != (len(layers), model.num_kv_heads, model.head_dim) or len(frequencies) * 2 != model.head_dim:
            raise UserError(f"{path}: has means of {tuple(means.shape)}, which are not the plan's model's; {again}")
        if powers.shape != (*means.shape[:-1], len(frequencies)) or powers.int().abs().max() > MAX_EXPONENT:
            raise UserError(f"{path}: has key scales that are not its means'; {again}")
        by_layer = zip(layers, map(KeyConstants.of, means, powers), strict=True)
        return cls(dict(by_layer), frequencies, scaling, data, scaled=scaled)

    def constants(self, layer: int, code: Code) -> KeyConstants | None:
        """Those of a layer of decode whose keys travel in a code: scales are 1 where it is not of `ROTATED`."""
        return (self.layers if code in ROTATED else self._plain).get(layer)

    @property
    def file(self) -> KeyOffsetsFile:
        """How a plan names it."""
        from pdtrim_deploy.plan import KeyOffsetsFile  # whoever has a plan has pydantic, which kernels do without

        digest = hashlib.sha256(self.data).hexdigest()
        return KeyOffsetsFile(sha256=digest, layers=tuple(sorted(self.layers)), scaled=self.scaled)

    @property
    def device(self) -> torch.device:
        """Where the constants are."""
        return next(iter(self.layers.values())).values.device

    def heads(self, heads: range) -> KeyOffsets:
        """Those of a range of these KV heads; cosines and sines are shared."""
        part = self._with(lambda of_layer: of_layer.heads(heads))
        part._tables, part._lock = self._tables, self._lock
        return part

    def to(self, device: torch.device) -> KeyOffsets:
        """The same on a device; made once."""
        if device == self.device:
            return self
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._with(lambda of_layer: of_layer.to(device))
            return self._by_device[device]

    def unscaled(self) -> KeyOffsets:
        """The same means with key scales of 1."""
        layers = {layer: of_layer.unscaled() for layer, of_layer in self.layers.items()}
        return KeyOffsets(layers, self.frequencies, self.scaling, self.data)

    def _with(self, change: Callable[[KeyConstants], KeyConstants]) -> KeyOffsets:
        layers = {layer: change(of_layer) for layer, of_layer in self.layers.items()}
        return KeyOffsets(layers, self.frequencies, self.scaling, self.data, scaled=self.scaled)

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
