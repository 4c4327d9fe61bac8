"""Greedy texts behind a plan, until a stop string, EOS or a number of tokens, for either hand-over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver, Ids, split
from pdtrim_deploy.evaluation.tasks.base import KV_TOKENS
from pdtrim_deploy.models.oracle import PDOracle


@dataclass(frozen=True)
class TextRequest:
    """A context of a token at least, the strings that end its text (not part of it), and the most tokens of it."""

    context: Ids
    until: tuple[str, ...]
    most_tokens: int


def texts(
    oracle: PDOracle,
    tokenizer: Any,
    requests: Sequence[TextRequest],
    hand_over: HandOver,
    note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """The text of each request; contexts of equal length and limit go side by side, and each ends by itself."""
    ends = end_tokens(oracle.decode_model, tokenizer)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        alike[len(request.context), request.most_tokens].append(number)
    results: dict[int, str] = {}
    for (length, most), numbers in alike.items():
        size = max(1, KV_TOKENS // (length + most))
        for at in range(0, len(numbers), size):
            batch = numbers[at : at + size]
            generated = _batch(oracle, tokenizer, [requests[number] for number in batch], hand_over, ends)
            results |= dict(zip(batch, generated, strict=True))
            note(f"{len(results)}/{len(requests)} texts")
    return [results[number] for number in range(len(requests))]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, the config's and those of the generation config."""
    ids = {tokenizer.eos_token_id}
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(ids - {None})


@torch.no_grad()
def _batch(
    oracle: PDOracle, tokenizer: Any, requests: list[TextRequest], hand_over: HandOver, ends: Collection[int]
) -> list[str]:
    parts = [split(request.context, hand_over) for request in requests]
    state = oracle.prefill(torch.tensor([prompt for prompt, _ in parts]))
    held, logits, position = oracle.hand_over(state), state.logits, state.tokens
    if parts[0][1]:
        logits = oracle.decode.logits(oracle.extend(torch.tensor([lead for _, lead in parts]), position, held)[:, -1])
        position += 1
    texts = [_Text(tokenizer, request, ends) for request in requests]
    while True:
        chosen = logits.argmax(-1).cpu()
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.add(token)
        if all(text.ended for text in texts):
            return [text.text for text in texts]
        logits = oracle.decode.logits(oracle.extend(chosen[:, None], position, held)[:, -1])
        position += 1


class _Text:
    """The text of one request as it grows."""

    def __init__(self, tokenizer: Any, request: TextRequest, ends: Collection[int]) -> None:
        self._tokenizer, self._request, self._ends = tokenizer, request, ends
        self._ids: list[int] = []
        self.text, self.ended = "", False

    def add(self, token: int) -> None:
        """Take the next token; nothing once the text has ended."""
        if self.ended:
            return
        if token in self._ends:
            self.ended = True
            return
        self._ids.append(token)
        # Stop strings may be special tokens, which the text itself is without.
        raw, self.text = (self._tokenizer.decode(self._ids, skip_special_tokens=skip) for skip in (False, True))
        stops = [(at, stop) for stop in self._request.until if stop and (at := raw.find(stop)) >= 0]
        if stops:
            inside = [at for _, stop in stops if (at := self.text.find(stop)) >= 0]
            self.text = self.text[: min(inside, default=None)]
        self.ended = bool(stops) or len(self._ids) == self._request.most_tokens
