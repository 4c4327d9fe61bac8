"""The tails of the prompts that a prefill worker computes: their lengths, and an attention backend of their own.

A batch's own backend knows queries of whole chunks. KV-only layers have queries of tails alone, so a second backend of
the same kind has the metadata of these. Written against SGLang 0.5.23 (ModelRunner, AttentionBackend).
"""

from __future__ import annotations

from typing import Any

from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.prompt_tail.rows import TailRows, tail_lengths, tail_rows


class PromptTails:
    """The last `tokens` tokens of each prompt. The scheduler's thread calls all of it."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._prompts = ByRequest[int]()
        self._batch: Any = None
        self._rows: TailRows | None = None

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        self._prompts.put(rid, room, prompt_tokens)

    def forget(self, room: int) -> None:
        """No more of it will be computed, or sent."""
        self._prompts.forget(room)

    def of(self, batch: Any) -> TailRows | None:
        """Those of the batch that runs now; None where it computes none."""
        return self._rows if batch is self._batch else None

    def follow(self, runner: Any) -> None:
        """From now on each extend batch of SGLang's ModelRunner has its tails, and a backend for them.

        A tail's batch is known to attention by its identity; all others go to the runner's own backend.
        """
        whole, tails = runner.attn_backend, runner._get_attention_backend()
        prepare, attend = whole.init_forward_metadata, whole.forward

        def prepared(batch: Any, *args: Any, **kwargs: Any) -> None:
            prepare(batch, *args, **kwargs)
            self._batch, self._rows = batch, None
            if not batch.forward_mode.is_extend() or not batch.rids:
                return
            spans = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
            rows = tail_rows(batch, tail_lengths(batch.rids, *spans, self._prompts, self._tokens))
            if rows is not None and not rows.everything:
                runner.kv_index_translator.bind_own_plan(rows.batch)
                tails.init_forward_metadata(rows.batch)
            self._rows = rows

        def attended(q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._rows is not None and batch is self._rows.batch:
                return tails.forward(q, k, v, layer, batch, *args, **kwargs)
            return attend(q, k, v, layer, batch, *args, **kwargs)

        whole.init_forward_metadata, whole.forward = prepared, attended
