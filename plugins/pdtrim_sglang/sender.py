"""SGLang's per-request sender in a prefill worker, on CommonKVSender of SGLang 0.5.23."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import CommonKVSender

from pdtrim_sglang.manager import PDTrimKVManager
from pdtrim_sglang.peer import Chunk
from pdtrim_sglang.state_slots import state_slot


class PDTrimKVSender(CommonKVSender):
    """Turns the scheduler's page lists into chunks with absolute prompt positions.

    `named` is called by the hook on `create_sender`: page counts alone do not tell where the last rows are.
    """

    kv_mgr: PDTrimKVManager
    prompt_tokens: int = 0
    _early_send_wait_event: Any

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, *args: Any, **kwargs: Any) -> None:
        self._progress = mgr.prefill_side.sender_opened(bootstrap_room)
        self._start = self._reused_tokens = 0
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)

    @property
    def supports_host_tensor_indices(self) -> bool:
        """Whether SGLang may hand `send` pages that are there after `indices_event` only, and wait for no forward pass.

        It makes both with CUDA calls.
        """
        return self.kv_mgr.prefill_side.on_gpu

    def named(self, rid: str, prompt_tokens: int) -> None:
        """Whose KV this sends: SGLang's request id, and how long its prompt is."""
        self.prompt_tokens = prompt_tokens
        self.kv_mgr.prefill_side.expect(rid, self.bootstrap_room, prompt_tokens)

    @property
    def prompt_tail(self) -> int:
        """As `PrefillSide.prompt_tail`."""
        return self.kv_mgr.prefill_side.prompt_tail

    def pop_decode_prefix_len(self) -> int:
        """From which prompt token on SGLang is to hand over chunks: cut layers need earlier ones than full layers.

        Behind the prompt's end it would hand over none, and nobody would compare the prompts.
        """
        side, reused = self.kv_mgr.prefill_side, super().pop_decode_prefix_len()
        if reused > self.prompt_tokens:
            reason = f"prefill sees {self.prompt_tokens} prompt tokens, decode has rows of {reused}"
            side.rooms.fail(self.bootstrap_room, reason)
            reused = 0
        self._reused_tokens, self._start = reused, side.first_sent(reused)
        return self._start

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Decode waits for `num_kv_indices` pages."""
        super().init(num_kv_indices, aux_index)
        self.kv_mgr.prefill_side.ready(self.bootstrap_room, self._reused_tokens)

    def get_max_transfer_tokens(self) -> int:
        return self.kv_mgr.prefill_side.max_chunk_tokens

    def send(
        self,
        kv_indices: Any,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        indices_event: Any = None,
    ) -> None:
        """Queue one chunk: `kv_indices` are its pages, once `indices_event` has come, `num_kv_tokens` its tokens."""
        if self.conclude_state in (KVPoll.Success, KVPoll.Failed):
            return
        pages, pages_slice, last, skip = self._prepare_send_indices(kv_indices)
        if skip or num_kv_tokens is None:
            return
        start = self._start + pages_slice.start * self.kv_mgr.kv_args.page_size
        events = tuple(event for event in (self._early_send_wait_event, indices_event) if event is not None)
        self._early_send_wait_event = None
        self.kv_mgr.prefill_side.submit(
            Chunk(
                room=self.bootstrap_room,
                pages=pages,
                pages_start=start,
                prompt_tokens=self.prompt_tokens,
                start=start,
                stop=start + num_kv_tokens,
                last=last,
                aux_index=self.aux_index,
                events=events,
                reused_tokens=self._reused_tokens,
                state_slot=state_slot(state_indices) if last else None,
            )
        )

    def poll(self) -> KVPoll:
        """SGLang's state of the transfer; a last chunk that nobody acknowledges fails at its deadline."""
        last_sent = self._progress.last_sent
        if last_sent is not None and not self._progress.complete and self.conclude_state is None:
            silence = time.monotonic() - last_sent
            if silence > self.kv_mgr.transport_config.stall_seconds:
                reason = f"decode did not acknowledge the KV within {silence:.0f} s"
                self.kv_mgr.prefill_side.stalled(self.bootstrap_room, reason)
        return super().poll()

    def abort(self) -> None:
        """Also tells decode, which would otherwise wait for its own deadline.

        Nothing is kept for it: of a prompt that is aborted between its chunks SGLang 0.5.23 never clears the sender.
        """
        side = self.kv_mgr.prefill_side
        side.rooms.fail(self.bootstrap_room, "aborted on the prefill side", "aborted")
        super().abort()
        side.sender_aborted(self.bootstrap_room, side.rooms.opened(self.bootstrap_room))

    def clear(self) -> None:
        side = self.kv_mgr.prefill_side
        opened = side.rooms.opened(self.bootstrap_room)
        super().clear()
        side.sender_closed(self.bootstrap_room, opened)

    def get_transfer_metric(self) -> KVTransferMetric:
        self._transfer_metric.transfer_total_bytes = self._progress.payload_bytes
        self._transfer_metric.transfer_latency_s = self._progress.seconds
        return self._transfer_metric
