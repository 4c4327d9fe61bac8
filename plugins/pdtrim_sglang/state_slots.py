"""States of linear attention in SGLang's MambaPool, and how they travel: native, layer by layer, behind all rows.

A request has one slot in all layers. Of a layer both tensors travel as they are there, the recurrent state first. They
are final once prefill has computed the prompt's last token, so they leave when everything else has (as in SGLang
0.5.23's own transfers: `StateType.MAMBA`, sent with the last pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateSlots:
    """All layers of a pool: `conv` `[layers, slots, channels, columns]`, `recurrent` `[layers, slots, heads, v, k]`."""

    conv: Tensor
    recurrent: Tensor

    @classmethod
    def of(cls, pool: Any) -> StateSlots:
        """Views of SGLang's MambaPool (0.5.23).

        Raises:
            RuntimeError: it keeps more than one convolution and one recurrent state a request.

        """
        from sglang.srt.mem_cache.memory_pool import MambaPool

        cache = getattr(pool, "mamba_cache", None)
        replays = getattr(pool, "enable_linear_replayssm", False) or getattr(
            pool, "enable_linear_replayssm_spec", False
        )
        if type(pool) is not MambaPool or cache is None or len(cache.conv) != 1 or replays or pool._slot_siblings:
            raise RuntimeError(
                f"pdtrim: states of linear attention are sent from SGLang's plain MambaPool, this worker has "
                f"{type(pool).__name__} with others beside them: start without --enable-linear-replayssm and options "
                "of unified memory"
            )
        return cls(cache.conv[0], cache.temporal)

    @property
    def layers(self) -> int:
        """Layers that keep a state."""
        return len(self.conv)

    @property
    def layer_bytes(self) -> int:
        """Bytes of a request's state in one layer, of this rank."""
        return sum(prod(side.shape[2:]) * side.itemsize for side in (self.recurrent, self.conv))

    def parts(self, most_bytes: int) -> Iterator[range]:
        """All layers, in ranges of at most `most_bytes`."""
        step = max(1, most_bytes // self.layer_bytes)
        for first in range(0, self.layers, step):
            yield range(first, min(first + step, self.layers))

    def pack(self, layers: range, slot: int) -> Tensor:
        """The state of `layers` in a slot, uint8, where the pool is."""
        return torch.cat([self._bytes(side, layers, slot) for side in (self.recurrent, self.conv)])

    def unpack(self, layers: range, slot: int, packed: Tensor) -> None:
        """Write what `pack` made, which is where the pool is."""
        for side in (self.recurrent, self.conv):
            size = len(layers) * prod(side.shape[2:]) * side.itemsize
            part, packed = packed[:size].clone(), packed[size:]  # aligned to the dtype
            rows = side[layers.start : layers.stop, slot]
            rows.copy_(part.view(side.dtype).view(rows.shape))

    @staticmethod
    def _bytes(side: Tensor, layers: range, slot: int) -> Tensor:
        return side[layers.start : layers.stop, slot].reshape(-1).view(torch.uint8)


def state_slot(indices: Any) -> int | None:
    """The slot of a request, from what SGLang gives `send` and `send_metadata`: one entry for each kind of state.

    None of a model without states; of sliding windows (SWA) it gives pages.
    """
    first = indices[0] if indices else None
    return int(first[0]) if isinstance(first, list) and len(first) == 1 else None
