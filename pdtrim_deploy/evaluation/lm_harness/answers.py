"""What lm-evaluation-harness asks of a model, in texts, answered by the PD oracle.

Texts become tokens as the harness's own adapter for transformers (HFLM, 0.4.13) makes them, so that behind a plan that
cuts nothing the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.lm_harness.generation import TextRequest, texts
from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver, Ids, loglikelihoods
from pdtrim_deploy.models.oracle import PDOracle

Note = Callable[[str], None]


class Answers:
    """The three kinds of request of the harness, for one plan.

    Args:
        hand_over: of both kinds; None: `decode` for likelihoods and `served` for generated text.

    """

    def __init__(self, oracle: PDOracle, tokenizer: Any, hand_over: HandOver | None, note: Note) -> None:
        self._oracle, self._tokenizer, self._note = oracle, tokenizer, note
        self._judged: HandOver = hand_over or "decode"
        self._generated: HandOver = hand_over or "served"
        self._room: int = oracle.decode_model.config.max_position_embeddings
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise UserError("the tokenizer has neither BOS nor EOS, which lm-eval puts before a text; add either to it")
        self._prefix: int = prefix

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Sum in nats and whether it is the greedy text, of each context and continuation."""
        return loglikelihoods(self._oracle, [self._pair(*pair) for pair in pairs], self._judged, self._note)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Sum in nats over all tokens of each text.

        Windows are the harness's, each behind one token of context. The second half of a window is judged behind the
        first, which prefill read: KV that travels is part of what is measured.
        """
        numbered = [(n, pair) for n, text in enumerate(texts) for window in self._windows(text) for pair in window]
        totals = [0.0] * len(texts)
        judged = loglikelihoods(self._oracle, [pair for _, pair in numbered], self._judged, self._note)
        for (number, _), (total, _) in zip(numbered, judged, strict=True):
            totals[number] += total
        return totals

    def generate_until(self, requests: Sequence[tuple[str, list[str], int]]) -> list[str]:
        """The greedy text behind each context, until one of its stop strings, EOS, or its number of tokens."""
        eos = self._tokenizer.eos_token
        prepared = []
        for context, until, most_tokens in requests:
            room = self._room - most_tokens
            if room < 1:
                raise UserError(
                    f"a task generates up to {most_tokens} tokens, and the model's context has {self._room}; "
                    "leave the task out, or lower max_gen_toks in its YAML"
                )
            ids = self._ids(context, self._tokenizer.bos_token) or (self._prefix,)
            prepared.append(TextRequest(ids[-room:], (*until, *([eos] if eos else ())), most_tokens))
        return texts(self._oracle, self._tokenizer, prepared, self._generated, self._note)

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Both as tokens, cut on the left to what the model's context holds."""
        if not context:
            ids = tuple(self._tokenizer.encode(continuation, add_special_tokens=False))
            pair = (ids[:1], ids[1:]) if ids[:1] == (self._prefix,) else ((self._prefix,), ids)
        else:
            kept = context.rstrip()
            whole = self._ids(context + continuation, self._start)
            # The context by itself, as HFLM has it: a merge across the border makes other tokens of the whole.
            before = self._ids(kept, self._start) if kept else ()
            pair = (before, whole[len(before) :]) if before else ((self._prefix,), whole)
        first, second = pair
        if not 1 <= len(second) <= self._room:
            raise UserError(
                f"the continuation {continuation[:40]!r} has {len(second)} tokens; a task's must have from 1 to "
                f"{self._room}, which the model's context holds"
            )
        return (first + second)[-self._room - 1 : -len(second)], second

    def _windows(self, text: str) -> list[list[tuple[Ids, Ids]]]:
        ids, windows = self._ids(text, self._start), []
        for at in range(0, len(ids), self._room):
            # The last window reaches back over tokens that were judged, so far that it is full.
            stop = min(at + self._room, len(ids))
            start = max(0, stop - self._room)
            before = ids[start - 1] if start else self._prefix
            windows.append(halves((before, *ids[start:at]), ids[at:stop]))
        return windows

    @property
    def _start(self) -> str:
        return str(self._tokenizer.decode([self._prefix]))

    def _ids(self, text: str, start: str | None) -> Ids:
        """With the tokenizer's special tokens, but where the text starts with them already."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=not (start and text.startswith(start))))


def halves(context: Ids, tokens: Ids) -> list[tuple[Ids, Ids]]:
    """A window as two requests: the second half of its tokens stands behind the first."""
    middle = len(tokens) // 2
    pairs = [(context, tokens[:middle]), (context + tokens[:middle], tokens[middle:])]
    return [(before, after) for before, after in pairs if after]
