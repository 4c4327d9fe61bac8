"""SGLang's multi-head KV pool with shorter buffers for sparse layers. Subclass of the one in SGLang 0.5.23."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_sglang.attention.windows import Window, layer_windows
from pdtrim_sglang.split_pool.kept_slots import KeptSlots

logger = logging.getLogger("sglang.srt.pdtrim.pool")


class SplitKVPool(MHATokenToKVPool):
    """Rows of a sparse layer are those of its window's `KeptSlots`; whoever reads them maps SGLang's slots first.

    Attributes:
        kept: one a distinct window, in the order of layers.

    """

    def __init__(self, size: int, page_size: int, *args: Any, plan: PDPlan, split: SplitPool, **options: Any) -> None:
        """`size` tokens in full layers, and what `split` makes of that in the others.

        Raises:
            RuntimeError: a pool would be too small for one request of the length that `split` names, or SGLang would
                size the pool again after it has captured CUDA graphs.

        """
        if options.get("post_capture_active"):
            raise RuntimeError("pdtrim: a split decode pool cannot grow after CUDA graphs: start decode without them")
        windows, device = layer_windows(plan), options["device"]
        self.kept: dict[Window, KeptSlots] = {}
        for layer, window in windows.items():
            if window not in self.kept:
                slots = split.slots(plan.kv[layer], size)
                if slots < plan.kv[layer].rows(size) + split.osl:
                    raise RuntimeError(
                        f"pdtrim: {size} tokens leave {slots} to layers that keep {window.n_first} + {window.n_last} "
                        f"prompt tokens: too few for one request of {split.isl} + {split.osl}; raise --max-total-tokens"
                    )
                self.kept[window] = KeptSlots(window, slots, size + page_size, device)
        self._layers = {layer: self.kept[window] for layer, window in windows.items()}
        super().__init__(size, page_size, *args, **options)
        held, whole = (sum(map(len, (*self.k_buffer, *self.v_buffer))), 2 * self.layer_num * (size + page_size))
        logger.info(
            "pdtrim: pool split for %d + %d tokens: %d tokens in %d full layers, %s in sparse ones; %.1f%% of one pool",
            split.isl, split.osl, size, self.layer_num - len(windows),
            ", ".join(f"{one.size} ({w.n_first}+{w.n_last})" for w, one in self.kept.items()), 100 * held / whole,
        )  # fmt: skip

    def of_layer(self, layer: int) -> KeptSlots | None:
        """The slots of a sparse layer; None for a full one, whose slots are SGLang's."""
        return self._layers.get(layer)

    def _rows(self, layer: int) -> int:
        own = self._layers.get(layer)
        return self.size + self.page_size if own is None else own.size + 1

    def _create_buffers_normal(self) -> None:
        shape = (self.head_num, self.head_dim), (self.head_num, self.v_head_dim)
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.k_buffer, self.v_buffer = (
                [
                    torch.zeros((self._rows(layer), *rest), dtype=self.store_dtype, device=self.device)
                    for layer in range(self.layer_num)
                ]
                for rest in shape
            )

    def _build_kv_buffer_descs(self) -> list[Any]:
        return []  # they say of all layers what is true of full ones; ours are below

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Address, bytes, and bytes of a page of every buffer."""
        buffers = [*self.k_buffer, *self.v_buffer]
        return (
            [buffer.data_ptr() for buffer in buffers],
            [buffer.nbytes for buffer in buffers],
            [buffer[0].nbytes * self.page_size for buffer in buffers],
        )

    def _store_kv_layer(self, layer_idx: int, loc: Tensor, cache_k: Tensor, cache_v: Tensor) -> None:
        own = self._layers.get(layer_idx)
        super()._store_kv_layer(layer_idx, loc if own is None else own.map[loc], cache_k, cache_v)

    def get_cpu_copy(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("pdtrim: a split decode pool is not backed up (pdtrim_sglang.requirements)")

    load_cpu_copy = move_kv_cache = get_cpu_copy
