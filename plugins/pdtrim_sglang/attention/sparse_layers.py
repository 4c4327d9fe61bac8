"""The sparse layers of a decode worker, and what each sees of a batch: what all attention backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdtrim_sglang.attention.windows import Window, compact_table, layer_windows
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.split_pool.pool import SplitKVPool


def sparse_windows(model_runner: Any) -> dict[int, Window]:
    """Window of each sparse layer; nothing in a prefill worker, and where the plan cuts no layer."""
    args = model_runner.server_args
    plan = read_plan(args.model_path) if args.disaggregation_mode == "decode" else None
    return layer_windows(plan) if plan else {}


class SparseLayers:
    """Of one model runner.

    Prompt lengths are noted by the hook on `_pre_alloc`, in a tensor that is put onto SGLang's `req_to_token_pool`.
    """

    def __init__(self, model_runner: Any) -> None:
        self.windows = sparse_windows(model_runner)
        self._pool, kv_pool = model_runner.req_to_token_pool, model_runner.token_to_kv_pool
        self._kept = kv_pool.kept if isinstance(kv_pool, SplitKVPool) else {}
        if self.windows:
            rows = self._pool.req_to_token
            self._pool.pdtrim_prompt_tokens = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)

    def tables(self, forward_batch: Any) -> dict[Window, tuple[Tensor, Tensor]]:
        """`compact_table` of every window for a decode batch, in slots of its layers; nothing for any other batch."""
        if not self.windows or not forward_batch.forward_mode.is_decode() or forward_batch.batch_size == 0:
            return {}
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        prompts, table = self._pool.pdtrim_prompt_tokens[rows], self._pool.req_to_token
        found = {}
        for window in set(self.windows.values()):
            slots, lengths = compact_table(table, rows, seq_lens, prompts, window)
            own = self._kept.get(window)
            found[window] = (slots if own is None else own.map[slots], lengths)
        return found
