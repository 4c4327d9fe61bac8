"""SGLang's torch_native backend, with sparse layers in decode. Subclass of the one in SGLang 0.5.23."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from pdtrim_sglang.attention.sparse_layers import SparseLayers
from pdtrim_sglang.attention.windows import Window


class SparseTorchNativeBackend(TorchNativeAttnBackend):
    """In a decode worker, a sparse layer attends to first + last prompt tokens and all generated ones.

    The tables are made once a forward pass and window, then SGLang's own decode loop runs on them.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._layers = SparseLayers(model_runner)
        self._tables: dict[Window, tuple[Tensor, Tensor]] = {}
        self._rows: Tensor | None = None
        self._layer_table: tuple[Tensor, Tensor] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._tables = self._layers.tables(forward_batch)
        if self._tables:
            rows = forward_batch.req_pool_indices
            self._rows = torch.arange(len(rows), device=rows.device)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        window = self._layers.windows.get(layer.layer_id)
        self._layer_table = self._tables.get(window) if window else None
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self._layer_table is not None and self._rows is not None:
            (req_to_token, seq_lens), req_pool_indices = self._layer_table, self._rows
        return super()._run_sdpa_forward_decode(
            query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, *args, **kwargs
        )
