"""SGLang's multi-head KV pool with shorter buffers for cut layers. Subclass of the one in SGLang 0.5.23."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.platforms import current_platform
from torch import Tensor

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_sglang.kept_pool.groups import KeptGroups
from pdtrim_sglang.kept_pool.rule import KeptRule, kept_rules

logger = logging.getLogger("sglang.srt.pdtrim.pool")


class KeptKVPool(MHATokenToKVPool):
    """Whole layers have a row for each of SGLang's slots, a cut layer one for each slot of its group.

    Attributes:
        kept: the groups, and what each request holds of them.

    """

    def __init__(self, size: int, page_size: int, *args: Any, plan: PDPlan, split: SplitPool, **options: Any) -> None:
        """`size` tokens in whole layers, and what `split` makes of that in the others.

        Raises:
            RuntimeError: a pool would be too small for one request of the length that `split` names, or SGLang would
                size the pool again after it has captured CUDA graphs.

        """
        if options.get("post_capture_active"):
            raise RuntimeError(
                "pdtrim: pools of cut layers cannot grow after CUDA graphs: unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
            )
        rules, pages = kept_rules(plan), dict[KeptRule, int]()
        for layer, rule in rules.items():
            slots = split.slots(plan.kv[layer], size, page_size)
            if slots < rule.rows(min(size, split.isl)) + split.osl:
                raise RuntimeError(
                    f"pdtrim: {size} tokens leave {slots} to layers that keep {rule} prompt rows: too few for one "
                    f"request of {split.isl} + {split.osl}; raise --max-total-tokens"
                )
            pages[rule] = slots // page_size
        self.kept = KeptGroups(rules, pages, page_size, options["device"])
        super().__init__(size, page_size, *args, **options)
        held, whole = (sum(map(len, (*self.k_buffer, *self.v_buffer))), 2 * self.layer_num * (size + page_size))
        logger.info(
            "pdtrim: pool for requests of %d + %d tokens: %d tokens in %d whole layers, "
            "%s in cut ones; %.1f%% of one pool",
            split.isl, split.osl, size, self.layer_num - len(rules),
            ", ".join(f"{group.size} ({group.rule})" for group in self.kept.groups), 100 * held / whole,
        )  # fmt: skip

    def slots_of(self, layer: int, slots: Tensor, row: int) -> Tensor:
        """Where a request's first tokens lie in a layer: SGLang's `slots` of them, or those that a cut layer keeps."""
        place = self.kept.of_layer.get(layer)
        return slots if place is None else self.kept.held_slots(place, row, len(slots))

    def _rows(self, layer: int) -> int:
        place = self.kept.of_layer.get(layer)
        return (self.size if place is None else self.kept.groups[place].size) + self.page_size

    def _create_buffers_normal(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.store_dtype, device=self.device)

        rows = [-(-self._rows(layer) // self.page_size) * self.page_size for layer in range(self.layer_num)]
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            if self.head_dim == self.v_head_dim:  # as SGLang: halves of one allocation, which some kernels count on
                both = [zeros(2, n, self.head_num, self.head_dim) for n in rows]
                self.k_buffer, self.v_buffer = ([buffer[half] for buffer in both] for half in (0, 1))
                return
            self.k_buffer = [zeros(n, self.head_num, self.head_dim) for n in rows]
            self.v_buffer = [zeros(n, self.head_num, self.v_head_dim) for n in rows]

    def _build_kv_buffer_descs(self) -> list[Any]:
        return []  # they say of all layers what is true of whole ones; ours are below

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Address, bytes, and bytes of a page of every buffer."""
        buffers = [*self.k_buffer, *self.v_buffer]
        return (
            [buffer.data_ptr() for buffer in buffers],
            [buffer.nbytes for buffer in buffers],
            [buffer[0].nbytes * self.page_size for buffer in buffers],
        )

    def get_cpu_copy(self, indices: Tensor, mamba_indices: Any = None, req_pool_index: int | None = None) -> list[Any]:
        """K and V of every layer of the request of row `req_pool_index`, on the host, when it is retracted.

        `indices` are SGLang's slots of the tokens that it will resume with (`Req.offload_kv_cache`): without the newest
        where a forward pass that writes it is under way.
        """
        assert req_pool_index is not None
        current_platform.synchronize()  # as SGLang's own: earlier passes may still write
        places = [self.slots_of(layer, indices, req_pool_index) for layer in range(self.layer_num)]
        rows = zip(self.k_buffer, self.v_buffer, places, strict=True)
        return [tuple(buffer[slots].cpu() for buffer in (k, v)) for k, v, slots in rows]

    def load_cpu_copy(
        self, kv_cache_cpu: list[Any], indices: Tensor, mamba_indices: Any = None, req_pool_index: int | None = None
    ) -> None:
        """The same back, when the request has got new slots."""
        assert req_pool_index is not None
        for layer, (k, v) in enumerate(kv_cache_cpu):
            slots = self.slots_of(layer, indices, req_pool_index)
            self.k_buffer[layer][slots], self.v_buffer[layer][slots] = k.to(self.device), v.to(self.device)
        current_platform.synchronize()

    def move_kv_cache(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("pdtrim: speculative decoding is refused (pdtrim_sglang.speculation)")
