"""SGLang's Triton backend, with sparse layers in decode. Subclass of the one in SGLang 0.5.23.

Not run on a GPU yet; on a CPU its kernels have run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from torch import Tensor

from pdtrim_sglang.attention.sparse_layers import SparseLayers
from pdtrim_sglang.attention.triton_indices import list_slots
from pdtrim_sglang.attention.windows import Window


@dataclass(frozen=True)
class _Lists:
    """What the decode kernel reads of one window; with CUDA graphs it stays where it is.

    Attributes:
        indptr: int32 `[requests + 1]`; `indices`: int64, of all requests one after another.
        splits: int32 `[requests]`; `uneven`: int32 `[1]`; SGLang's kernels fill and read both.

    """

    indptr: Tensor
    indices: Tensor
    splits: Tensor
    uneven: Tensor

    @classmethod
    def empty(cls, requests: int, tokens: int, device: Any) -> _Lists:
        ints = {"dtype": torch.int32, "device": device}
        return cls(
            torch.zeros(requests + 1, **ints),
            torch.empty(tokens, dtype=torch.int64, device=device),
            torch.ones(requests, **ints),
            torch.zeros(1, **ints),
        )

    def of(self, full: Any, requests: int) -> Any:
        """SGLang's ForwardMetadata with these in the place of the full layers'."""
        return replace(
            full,
            kv_indptr=self.indptr[: requests + 1],
            kv_indices=self.indices,
            num_kv_splits=self.splits[:requests],
            uneven_batch=self.uneven,
        )


class SparseTritonBackend(TritonAttnBackend):
    """Each window has its own `_Lists`, which its layers are given in place of the batch's.

    A captured CUDA graph reads them where they were at its capture; before each replay they are filled anew.
    """

    forward_metadata: Any

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_runner, *args, **kwargs)
        self._layers = SparseLayers(model_runner)
        self._sparse: dict[Window, ForwardMetadata] = {}
        self._graph: dict[Window, _Lists] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._sparse = {}
        if self._layers.batch(forward_batch) is not None:
            requests, device = forward_batch.batch_size, forward_batch.seq_lens.device
            tokens = forward_batch.seq_lens_sum or self._most(requests)
            lists = {window: _Lists.empty(requests, tokens, device) for window in self._layers.distinct}
            self._fill(lists, forward_batch)
            self._sparse = {window: one.of(self.forward_metadata, requests) for window, one in lists.items()}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        shape = max_bs, self._most(max_bs), self.cuda_graph_kv_indices.device
        self._graph = {window: _Lists.empty(*shape) for window in self._layers.distinct}

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._fill(self._graph, forward_batch)
        if in_capture:
            full, requests = self.forward_metadata, forward_batch.batch_size
            self._sparse = {window: lists.of(full, requests) for window, lists in self._graph.items()}

    def _most(self, requests: int) -> int:
        """Tokens that a batch attends to at most: slots of the pool, which no two share, and one a padded request."""
        return int(self.token_to_kv_pool.size) + requests

    def _fill(self, windows: dict[Window, _Lists], forward_batch: Any) -> None:
        batch = self._layers.batch(forward_batch)
        if batch is None:
            return
        for window, lists in windows.items():
            hidden, requests = batch.hidden(window), len(batch.rows)
            lengths = batch.seq_lens - hidden
            lists.indptr[1 : requests + 1] = lengths.cumsum(0)
            own = batch.maps.get(window)
            list_slots(batch.req_to_token, batch.rows, hidden, lists.indptr, lists.indices, window, own)
            self.get_num_kv_splits(lists.splits[:requests], lengths, lists.uneven)

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        window = self._layers.windows.get(layer.layer_id)
        full = self.forward_metadata
        self.forward_metadata = self._sparse.get(window, full) if window else full
        try:
            return super().forward_decode(q, k, v, layer, *args, **kwargs)
        finally:
            self.forward_metadata = full
