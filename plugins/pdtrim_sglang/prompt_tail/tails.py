"""Prefill by two models: prompts run through one of them up to their tails, which run through the other.

Both write K and V into the same pool. What a batch has of bodies runs first: a tail reads its body's K and V, and no
body reads a tail's. Each part has metadata of attention of its own, the tails' in a second backend of the same kind.
Written against SGLang 0.5.23 (ModelRunner, EagerRunner, AttentionBackend).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from torch import Tensor

from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.prompt_tail.rows import BatchPart, part_of, tail_lengths


@dataclass(frozen=True)
class _Parts:
    """What a batch has of bodies and of tails; a batch of the one kind alone is not divided."""

    tail_tokens: int
    body: BatchPart | None = None
    tail: BatchPart | None = None


class PromptTails:
    """The last `tokens` tokens of each prompt. The scheduler's thread calls all of it.

    Args:
        body: SGLang's model (`LlamaModel`, say) for the tokens before them.

    """

    def __init__(self, tokens: int, body: Any) -> None:
        self._tokens, self._body = tokens, body
        self._prompts = ByRequest[int]()
        self._batch: Any = None
        self._parts: _Parts | None = None

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        self._prompts.put(rid, room, prompt_tokens)

    def forget(self, room: int) -> None:
        """No more of it will be computed, or sent."""
        self._prompts.forget(room)

    def completes(self, batch: Any) -> bool:
        """Whether a layer that has run `batch`, a part of the batch that runs now or all of it, is done with that."""
        body = None if self._parts is None else self._parts.body
        return body is None or batch is not body.batch

    def follow(self, runner: Any) -> None:
        """From now on SGLang's ModelRunner, whose model is the tails', computes prompts by both models."""
        self._follow_attention(runner)
        model = runner.model.model
        if hasattr(model, "layers_to_capture"):  # SGLang has set those that an EAGLE3 draft reads, of this model alone
            self._body.layers_to_capture = model.layers_to_capture
        model.forward = self._divided(model.forward)

    def _follow_attention(self, runner: Any) -> None:
        """A part is known to attention by its identity; all batches but tails go to the runner's own backend."""
        whole, tails = runner.attn_backend, runner._get_attention_backend()
        tails.own_queries = True  # read by ours on a CPU alone (cpu/torch_attention.py)
        prepare, attend, bind = whole.init_forward_metadata, whole.forward, runner.kv_index_translator.bind_own_plan

        def prepared(batch: Any, *args: Any, **kwargs: Any) -> None:
            self._batch, self._parts = batch, self._parts_of(batch)
            if self._parts is None or self._parts.body is None or self._parts.tail is None:
                prepare(batch, *args, **kwargs)
                return
            for part, plan in ((self._parts.body, prepare), (self._parts.tail, tails.init_forward_metadata)):
                bind(part.batch)
                plan(part.batch)

        def attended(q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            tail = None if self._parts is None else self._parts.tail
            if tail is not None and batch is tail.batch:
                return tails.forward(q, k, v, layer, batch, *args, **kwargs)
            return attend(q, k, v, layer, batch, *args, **kwargs)

        whole.init_forward_metadata, whole.forward = prepared, attended

    def _parts_of(self, batch: Any) -> _Parts | None:
        """None of a batch that is no prompts': SGLang's dummies name no requests."""
        if not batch.forward_mode.is_extend() or not batch.rids:
            return None
        prefixes, extends = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        lengths = tail_lengths(batch.rids, prefixes, extends, self._prompts, self._tokens)
        before = [extend - length for extend, length in zip(extends, lengths, strict=True)]
        if not any(lengths) or not any(before):
            return _Parts(sum(lengths))
        body = part_of(batch, [0] * len(before), before)
        return _Parts(sum(lengths), body, part_of(batch, before, lengths))

    def _divided(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        """`whole`, the tails' model, for their rows; for others the body's model."""

        def forward(input_ids: Tensor, positions: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.forward_mode.is_extend() or not batch.rids:
                return whole(input_ids, positions, batch, *args, **kwargs)
            if batch is not self._batch or self._parts is None:
                raise RuntimeError("pdtrim: SGLang runs a prompt whose attention it has not prepared")
            body, tail = self._parts.body, self._parts.tail
            if body is None or tail is None:
                model = whole if self._parts.tail_tokens else self._body.forward
                return model(input_ids, positions, batch, *args, **kwargs)

            def run(model: Callable[..., Any], part: BatchPart) -> Any:
                def rows_of(value: Any) -> Any:
                    return value[part.rows] if isinstance(value, Tensor) else value

                named = {name: rows_of(value) for name, value in kwargs.items()}
                with forward_context(get_forward_context(), forward_batch=part.batch):
                    return model(rows_of(input_ids), rows_of(positions), part.batch, *map(rows_of, args), **named)

            return _joined((run(self._body.forward, body), run(whole, tail)), (body.rows, tail.rows))

        return forward


def _joined(results: tuple[Any, Any], rows: tuple[Tensor, Tensor]) -> Any:
    """Rows of both parts in the batch's order: hidden states, and those of layers that SGLang captures for a draft.

    Raises:
        RuntimeError: SGLang's model returns something else.

    """
    first, second = results
    if isinstance(first, Tensor):
        whole = first.new_empty((len(first) + len(second), *first.shape[1:]))
        return whole.index_copy_(0, rows[0], first).index_copy_(0, rows[1], second)
    if isinstance(first, list | tuple) and len(first) == len(second):
        return type(first)(_joined(both, rows) for both in zip(first, second, strict=True))
    raise RuntimeError(
        f"pdtrim: SGLang's model returns {type(first).__name__}, which the plugin cannot put together of a prompt's "
        "body and tail: build the bundle with healing.kv_only_tail 0"
    )
