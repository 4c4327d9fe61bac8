"""SGLang's FlashInfer backend, with sparse layers in decode. Subclass of the one in SGLang 0.5.23.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from pdtrim_sglang.attention.sparse_layers import SparseLayers
from pdtrim_sglang.attention.windows import KVIndices, Window, kv_indices


class SparseFlashInferBackend(FlashInferAttnBackend):
    """Each window has a decode wrapper of its own behind SGLang's, planned with its own pages.

    Without CUDA graphs (`pdtrim_sglang.requirements`): a captured one would replay the full layers' indices.
    """

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_runner, *args, **kwargs)
        self._layers = SparseLayers(model_runner)
        self._wrappers = {window: self._wrapper() for window in self._layers.distinct}
        self._planned: dict[Window, int] = {}

    def _wrapper(self) -> Any:
        return flashinfer_backend.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace_buffer, "NHD", backend=self.decode_backend, use_tensor_cores=self.decode_use_tensor_cores
        )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        tables = self._layers.tables(forward_batch)
        for window, table in tables.items():
            self._plan(self._wrappers[window], kv_indices(*table))
        self._planned = {}
        if tables:
            wrappers: list[Any] = self.forward_metadata.decode_wrappers
            self._planned = {window: len(wrappers) + i for i, window in enumerate(self._wrappers)}
            self.forward_metadata.decode_wrappers = [*wrappers, *self._wrappers.values()]

    def _plan(self, wrapper: Any, sparse: KVIndices) -> None:
        """What `FlashInferIndicesUpdaterDecode.call_begin_forward` does for the full layers."""
        updater = self.indices_updater_decode
        wrapper.begin_forward(
            sparse.indptr,
            sparse.indices.to(torch.int32),
            sparse.last_page_len,
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            1,
            data_type=updater.data_type,
            q_data_type=updater.q_data_type,
            non_blocking=True,
            fixed_split_size=self.decode_split_tile_size,
            disable_split_kv=False,
        )

    def _get_wrapper_idx(self, layer: Any) -> int:
        window = self._layers.windows.get(layer.layer_id)
        return self._planned[window] if window in self._planned else super()._get_wrapper_idx(layer)
