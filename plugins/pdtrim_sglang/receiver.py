"""SGLang's per-request receiver in a decode worker, on CommonKVReceiver of SGLang 0.5.23."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from pdtrim_sglang.manager import PDTrimKVManager
from pdtrim_sglang.messages import UNREGISTERED
from pdtrim_sglang.state_slots import state_slot


class PDTrimKVReceiver(CommonKVReceiver):
    """Opens the request's room before prefill hears of it, and closes it before its pages can be freed.

    `prompt_tokens` and `row`, the request's in `req_to_token`, are set by the hook on `_send_kv_metadata`, and on a GPU
    `forward_done`, an event after which nobody else writes into the request's slots.
    """

    kv_mgr: PDTrimKVManager
    prompt_tokens: int = 0
    row: int | None = None
    forward_done: Any = None

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        **options: Any,
    ) -> None:
        """Destination pages `kv_indices` (int32) and metadata row `aux_index` are allocated: ask for the KV."""
        prefix = decode_prefix_len or 0
        assert aux_index is not None
        request = self.bootstrap_room, self.prompt_tokens, prefix, kv_indices, aux_index
        ranks = self.prefill_info.attn_tp_size
        self.kv_mgr.decode_side.open_room(
            *request, self.forward_done, self.row, prefill_ranks=ranks, state_slot=state_slot(state_indices)
        )
        self.kv_mgr.prompts_announced[self.bootstrap_room] = self.prompt_tokens
        super().send_metadata(kv_indices, aux_index, state_indices, decode_prefix_len, **options)
        self.kv_mgr.prompts_announced.pop(self.bootstrap_room, None)

    def poll(self) -> KVPoll:
        status = super().poll()
        if status in (KVPoll.Success, KVPoll.Failed):
            self.kv_mgr.decode_side.close_room(self.bootstrap_room)
        # SGLang registers once with each prefill worker; where that message was lost, every request would fail.
        if status == KVPoll.Failed and UNREGISTERED in self.kv_mgr.failure_records.get(self.bootstrap_room, ""):
            self.invalidate_cached_bootstrap_infos()
        return status

    def abort(self) -> None:
        super().abort()
        self.kv_mgr.decode_side.close_room(self.bootstrap_room)

    def clear(self) -> None:
        super().clear()
        self.kv_mgr.decode_side.close_room(self.bootstrap_room)
