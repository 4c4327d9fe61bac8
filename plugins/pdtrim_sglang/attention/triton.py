"""SGLang's Triton backend, with sparse layers in decode. Subclass of the one in SGLang 0.5.23.

Not run on a GPU yet; on a CPU its kernel has run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from torch import Tensor

from pdtrim_sglang.attention.sparse_layers import SparseLayers
from pdtrim_sglang.attention.windows import KVIndices, Window, kv_indices


class SparseTritonBackend(TritonAttnBackend):
    """Each window has its own `kv_indptr` and `kv_indices`, which its layers are given in place of the batch's.

    Without CUDA graphs (`pdtrim_sglang.requirements`): a captured one would replay the full layers' indices.
    """

    forward_metadata: Any

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_runner, *args, **kwargs)
        self._layers = SparseLayers(model_runner)
        self._sparse: dict[Window, ForwardMetadata] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        tables = self._layers.tables(forward_batch)
        self._sparse = {window: self._metadata(kv_indices(*table)) for window, table in tables.items()}

    def _metadata(self, sparse: KVIndices) -> ForwardMetadata:
        splits = torch.empty_like(self.forward_metadata.num_kv_splits)
        self.get_num_kv_splits(splits, sparse.lengths)
        return replace(self.forward_metadata, kv_indptr=sparse.indptr, kv_indices=sparse.indices, num_kv_splits=splits)

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        window = self._layers.windows.get(layer.layer_id)
        full = self.forward_metadata
        self.forward_metadata = self._sparse.get(window, full) if window else full
        try:
            return super().forward_decode(q, k, v, layer, *args, **kwargs)
        finally:
            self.forward_metadata = full
