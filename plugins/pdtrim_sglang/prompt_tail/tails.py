"""Tails of prompts, which run all layers while the tokens before them leave at the first KV-only one.

Tails have metadata of attention of their own, in a second backend of the same kind. Written against SGLang 0.5.23
(ModelRunner, EagerRunner, AttentionBackend).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.prompt_tail.layers import DividedLayers
from pdtrim_sglang.prompt_tail.rows import BatchPart, Division, part_of, tail_lengths


class PromptTails:
    """The last `tokens` tokens of each prompt. The scheduler's thread calls all of it.

    Args:
        first: the first layer that other tokens run for its K and V alone.
        bodies: in their place that layer and all behind it, which write K and V (`DividedLayers`).

    """

    def __init__(self, tokens: int, first: int, bodies: Sequence[Any]) -> None:
        self._tokens, self._first, self._bodies = tokens, first, bodies
        self._prompts = ByRequest[int]()
        self._batch: Any = None
        self._division: Division | None = None

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        self._prompts.put(rid, room, prompt_tokens)

    def forget(self, room: int) -> None:
        """No more of it will be computed, or sent."""
        self._prompts.forget(room)

    def follow(self, runner: Any) -> None:
        """From now on the last layers of SGLang's ModelRunner are divided.

        Raises:
            RuntimeError: a draft model reads one of these layers, and SGLang takes it from between them.

        """
        self._follow_attention(runner)
        model = runner.model.model
        layers = DividedLayers(model.layers[self._first :], self._bodies, self._division_of)
        read = [layer for layer in getattr(model, "layers_to_capture", ()) if layer > self._first]
        if read and not layers.captures:
            raise RuntimeError(
                f"pdtrim: the draft model reads what layer {read[0]} reads, where tails of prompts run alone: start "
                "prefill without a draft model, or build the bundle with healing.kv_only_tail 0"
            )

    def _follow_attention(self, runner: Any) -> None:
        """A tail is known to attention by its identity; all other batches go to the runner's own backend."""
        whole, tails = runner.attn_backend, runner._get_attention_backend()
        tails.own_queries = True  # read by ours on a CPU alone (cpu/torch_attention.py)
        prepare, attend, bind = whole.init_forward_metadata, whole.forward, runner.kv_index_translator.bind_own_plan

        def prepared(batch: Any, *args: Any, **kwargs: Any) -> None:
            self._batch, self._division = batch, self._divided(batch)
            prepare(batch, *args, **kwargs)
            if (tail := self._tail) is not None:
                bind(tail.batch)
                tails.init_forward_metadata(tail.batch)

        def attended(q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if (tail := self._tail) is not None and batch is tail.batch:
                return tails.forward(q, k, v, layer, batch, *args, **kwargs)
            return attend(q, k, v, layer, batch, *args, **kwargs)

        whole.init_forward_metadata, whole.forward = prepared, attended

    @property
    def _tail(self) -> BatchPart | None:
        """Of the batch that runs, if it is divided."""
        return None if self._division is None or self._division.parts is None else self._division.parts[1]

    def _divided(self, batch: Any) -> Division | None:
        if not _of_prompts(batch):
            return None
        prefixes, extends = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        lengths = tail_lengths(batch.rids, prefixes, extends, self._prompts, self._tokens)
        before = [extend - length for extend, length in zip(extends, lengths, strict=True)]
        if not any(before):
            return None
        if not any(lengths):
            return Division()
        return Division((part_of(batch, [0] * len(before), before), part_of(batch, before, lengths)))

    def _division_of(self, batch: Any) -> Division | None:
        if batch is not self._batch and _of_prompts(batch):
            raise RuntimeError("pdtrim: SGLang runs a prompt whose attention it has not prepared")
        return self._division if batch is self._batch else None


def _of_prompts(batch: Any) -> bool:
    """SGLang's dummies name no requests."""
    return batch.forward_mode.is_extend() and bool(batch.rids)
