"""A worker's paged KV pool as the wire format sees it: one K and one V tensor a layer, rows by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.pack import prepare


@dataclass(frozen=True)
class PoolView:
    """Tensors `[slots, kv_heads, head_dim]` of every local layer, and the page size in tokens."""

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int

    @classmethod
    def of(cls, pool: Any) -> PoolView:
        """View of SGLang's MHATokenToKVPool (mem_cache/memory_pool.py, 0.5.23).

        Raises:
            RuntimeError: another kind of pool (MLA, hybrid, HND, quantised), which the wire format does not know.

        """
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        if type(pool) is not MHATokenToKVPool or pool.use_hnd or pool.k_buffer[0].dim() != 3:
            raise RuntimeError(
                f"pdtrim: needs a plain multi-head KV pool, this worker has {type(pool).__name__}: "
                "serve a Llama, Mistral, Qwen2 or Qwen3 bundle without KV-layout options"
            )
        if pool.k_buffer[0].is_cpu:
            prepare()
        return cls(pool.k_buffer, pool.v_buffer, pool.page_size)

    @property
    def kv_heads(self) -> int:
        """KV heads that this rank holds."""
        return self.keys[0].shape[1]

    def slots(self, pages: Any, tokens: int) -> Tensor:
        """Slots (int64 `[tokens]`) of the first `tokens` tokens on `pages` (int array)."""
        first = torch.as_tensor(pages, dtype=torch.int64, device=self.keys[0].device) * self.page_size
        offsets = torch.arange(self.page_size, device=first.device)
        return (first[:, None] + offsets).flatten()[:tokens]


def row_view(pointer: int, length: int) -> memoryview:
    """Writable bytes at a host address, for SGLang's aux rows (host tensors on every device)."""
    import ctypes

    return memoryview((ctypes.c_ubyte * length).from_address(pointer)).cast("B")
