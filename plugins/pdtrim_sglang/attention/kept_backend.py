"""One attention backend of SGLang's for whole layers, and one more of the same kind for each group of cut layers.

Each builds its own metadata with its own code: that of a group reads the group's `req_to_kept` and kept lengths where
that of whole layers reads `req_to_token` and lengths. So CUDA graphs work as the backend makes them work: what a graph
captured stays where it is and is filled anew before each replay. Written against SGLang 0.5.23's AttentionBackend
(layers/attention/base_attn_backend.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from torch import Tensor

from pdtrim_sglang.attention.overlay import group_runner
from pdtrim_sglang.kept_pool.group import KeptGroup
from pdtrim_sglang.kept_pool.pool import KeptKVPool

logger = logging.getLogger("sglang.srt.pdtrim.attention")


@dataclass
class _GroupAttention:
    """The backend of a group's layers, and the batch as they see it.

    Attributes:
        place: of the group in `KeptGroups.groups`.
        batch: a copy of SGLang's ForwardBatch with the group's lengths and newest slots; None before a decode batch.
        graph: int64 `[2, requests]`, lengths and newest slots of a batch that a CUDA graph runs, at a fixed address.

    """

    place: int
    group: KeptGroup
    backend: Any
    translator: Any
    batch: Any = None
    graph: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.int64))

    def see(self, batch: Any, kept: Any, fixed: bool) -> Any:
        """Set `batch` from SGLang's; `fixed`: in the memory that a CUDA graph reads."""
        lengths, newest = self.group.of_batch(batch.req_pool_indices, batch.seq_lens)
        if fixed:
            lengths, newest = self.graph[:, : len(lengths)].copy_(torch.stack((lengths, newest)))
        view = copy.copy(batch)
        view.seq_lens, view.out_cache_loc = lengths, newest
        if batch.seq_lens_cpu is not None:
            known = kept.host_lengths(self.place, batch.seq_lens_cpu)
            view.seq_lens_cpu = lengths.cpu() if known is None else known  # a warm-up's, which no scheduler has seen
            view.seq_lens_sum = int(view.seq_lens_cpu.sum())
        self.translator.bind_own_plan(view)
        self.batch = view
        return view


class KeptBackend(AttentionBackend):
    """Decode attention of a worker whose KV pool is a KeptKVPool. Other batches go to the backend of whole layers."""

    def __init__(self, runner: Any, make: Callable[[Any], Any]) -> None:
        """`make` is SGLang's factory of the backend."""
        super().__init__()
        pool: KeptKVPool = runner.token_to_kv_pool
        self._kept, self._whole = pool.kept, make(runner)
        self._groups = []
        for place, group in enumerate(pool.kept.groups):
            of_group = group_runner(runner, group)
            self._groups.append(_GroupAttention(place, group, make(of_group), of_group.kv_index_translator))
        logger.info(
            "pdtrim: %s for whole layers, and one for each of %d groups of cut layers",
            type(self._whole).__name__, len(self._groups),
        )  # fmt: skip
        self.attn_backend_list = [self._whole, *(attention.backend for attention in self._groups)]
        for name, value in vars(AttentionBackend).items():  # what a backend says of itself, to whoever asks the class
            if not (name.startswith("_") or callable(value) or isinstance(value, property) or name in vars(self)):
                setattr(self, name, getattr(self._whole, name))

    def __getattr__(self, name: str) -> Any:
        """What SGLang asks of one kind of backend only."""
        return getattr(vars(self)["_whole"], name)

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        return self._whole.shared_read_ends(fm)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        fill: int = self._whole.get_cuda_graph_seq_len_fill_value()
        return fill

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._whole.init_cuda_graph_state(max_bs, max_num_tokens)
        for attention in self._groups:
            attention.backend.init_cuda_graph_state(max_bs, max_num_tokens)
            attention.graph = torch.zeros(2, max_bs, dtype=torch.int64, device=attention.group.device)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._whole.init_forward_metadata(forward_batch)
        for attention in self._groups:
            attention.batch = None
            if forward_batch.forward_mode.is_decode_or_idle():
                attention.backend.init_forward_metadata(attention.see(forward_batch, self._kept, fixed=False))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self._whole.init_forward_metadata_out_graph(forward_batch, in_capture)
        for attention in self._groups:
            view = attention.see(forward_batch, self._kept, fixed=True)
            attention.backend.init_forward_metadata_out_graph(view, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self._whole.init_forward_metadata_in_graph(forward_batch)
        for attention in self._groups:
            attention.backend.init_forward_metadata_in_graph(attention.batch)

    def on_after_cuda_graph_warmup(self) -> None:
        for backend in self.attn_backend_list or ():
            backend.on_after_cuda_graph_warmup()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kw: Any
    ) -> Tensor:
        backend, batch = self._of(layer, forward_batch, save_kv_cache)
        output: Tensor = backend.forward(q, k, v, layer, batch, save_kv_cache, **kw)
        return output

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kw: Any
    ) -> Tensor:
        backend, batch = self._of(layer, forward_batch, save_kv_cache)
        output: Tensor = backend.forward_decode(q, k, v, layer, batch, save_kv_cache, **kw)
        return output

    def forward_extend(self, *args: Any, **kw: Any) -> Tensor:
        output: Tensor = self._whole.forward_extend(*args, **kw)
        return output

    def _of(self, layer: Any, forward_batch: Any, save_kv_cache: bool) -> tuple[Any, Any]:
        place = self._kept.of_layer.get(layer.layer_id)
        if place is None or not forward_batch.forward_mode.is_decode_or_idle():
            return self._whole, forward_batch
        if not save_kv_cache:  # fused with RoPE, say: it was written to the slots of whole layers
            raise RuntimeError(
                "pdtrim: this model writes K and V past the attention backend: serve a plan without cuts"
            )
        attention = self._groups[place]
        return attention.backend, attention.batch
