"""KV of a draft model (EAGLE, MTP), which travels beside the plan's: all its rows, as its pool holds them.

SGLang gives a token the same slot in both pools, and has every attention rank of prefill send its own to decode's. A
chunk's draft rows stand behind its other rows. Tokens that were drafted from other rows than prefill's would still be
verified by decode's model: fewer of them would be accepted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.kvcache.pack import pack, prepare, unpack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.plan_source import dense_plan


def wire_digest(plan: PDPlan, draft: DraftRows | None) -> str:
    """What both workers must have in common, as 64 hex digits: the plan, and what travels of a draft model."""
    if draft is None:
        return plan.digest
    return hashlib.sha256(f"{plan.digest} {draft.plan.digest}".encode()).hexdigest()


@dataclass(frozen=True)
class DraftRows:
    """All layers of a draft model's pool: `keys` and `values` are `[slots, kv_heads, head_dim]` each, or of latents.

    `plan` sends them whole, and counts the KV heads of this rank alone.
    """

    plan: PDPlan
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, pool: Any, keys: list[Tensor], values: list[Tensor], slots: int, *, latents: bool = False) -> DraftRows:
        """Of a draft model's `pool`, with its tensors (as in `PoolView`), beside a pool of `slots` slots.

        Raises:
            RuntimeError: it has other slots, or its dtype is none that is sent.

        """
        if len(keys[0]) != slots:
            raise RuntimeError(
                f"pdtrim: the draft model's KV pool has {len(keys[0])} slots, the model's {slots}, so that a token has "
                "other slots there: start without --speculative-algorithm"
            )
        tensors = SimpleNamespace(k_buffer=keys, v_buffer=values, dtype=pool.dtype)
        return cls(dense_plan(len(keys), tensors, keys[0].shape[1], latents=latents), keys, values)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's rows."""
        return self.plan.payload_bytes(1)

    def bytes_of(self, start: int, stop: int) -> int:
        """Bytes of the rows of tokens `[start, stop)`."""
        return (stop - start) * self.token_bytes

    def pack(self, layout: ChunkLayout, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of the chunk that has `layout`; arguments and result as of `kvcache.pack.pack`."""
        return pack(self._layout(layout), self.keys, self.values, slots, out)

    def unpack(self, layout: ChunkLayout, packed: Tensor, slots: Tensor) -> None:
        """Scatter what `pack` made."""
        unpack(self._layout(layout), packed, self.keys, self.values, slots)

    def prepare(self) -> None:
        """Compile what packs them, before the first request."""
        prepare(self.plan, self.keys[0], None, self.values[0])

    def _layout(self, layout: ChunkLayout) -> ChunkLayout:
        return chunk_layout(self.plan, layout.prompt_tokens, layout.start, layout.stop)
