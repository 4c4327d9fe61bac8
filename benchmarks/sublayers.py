"""Attentions, MLPs and whole blocks that decode goes without -> results/sublayers.json.

`make bench-sublayers`. Greedy takes units of one kind from decode alone, on the same calibration text (Brown), for
several draws of it; nothing is refitted, prefill stays whole. Each choice is judged on development text of Brown and of
source code, behind the dense model's prompt KV: the loss of the text's own next tokens, sequence by sequence, so that
differences are paired. Block-forwards count the search. Each row is written down when it is made, and the benchmark
goes on from there.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from __notes import Note, timed_notes
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import Split, registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.pruning.units import Counts

SIZES = {"attention": (2, 4, 8), "mlp": (1, 2), "block": (1, 2, 4)}
"""After how many removed units of each kind a choice is judged; the last is the search's end."""
ENDS = {"attention": Counts(attentions=8), "mlp": Counts(mlps=2), "block": Counts(blocks=4)}
CORPORA = ("brown", "code")
PLACE = HERE.parent / "out" / "bench-sublayers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[*SIZES], choices=SIZES, metavar="KIND")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="draws of the calibration text")
    parser.add_argument("--calibration", type=int, default=4, help="sequences that choose")
    parser.add_argument("--sequences", type=int, default=16, help="judged, of each corpus")
    parser.add_argument("--length", type=int, default=384, help="tokens of each, of both")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of its prompt")
    options = parser.parse_args()
    note = timed_notes()
    about = [[name, getattr(options, name)] for name in ("calibration", "sequences", "length", "prompt")]
    log, bench = RowLog(PLACE / "rows.jsonl", about), None
    for seed in options.seeds:
        for kind in options.kinds:
            if log.find(kind=kind, seed=seed) is None:
                bench = bench or _Bench(options, RowLog(PLACE / "judged.jsonl", about), note)
                log.append(*bench.rows(kind, seed))
    kept = [row for row in log.rows if row["kind"] in options.kinds and row["seed"] in options.seeds]
    write("sublayers", options, kept)


class _Bench:
    """The model, and the text that its choices are judged on."""

    def __init__(self, options: argparse.Namespace, judgements: RowLog, note: Note) -> None:
        self._cache = Cache.default()
        checkpoint = resolve(DEFAULT_SOURCE, self._cache, note)
        self._options, self._judgements, self._note = options, judgements, note
        self._texts = dict[str, NextTokenLoss]()
        self._tokenizer, self._model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)

    def rows(self, kind: str, seed: int) -> list[dict[str, Any]]:
        """Of one search: a row for each number of units at which it is judged."""
        options = self._options
        ids = self._text("brown", "calibration", options.calibration, seed)
        inputs = SearchInputs(self._model, ids, Greedy(), folder=PLACE / f"{kind}-{seed}")
        choice = choose_stages(inputs, 0, ENDS[kind], options.prompt, self._note).decode
        rows = []
        for step in choice.steps:
            if step.step in SIZES[kind]:
                removed = Solution.of(choice.removed[: step.step])
                row = {"kind": kind, "seed": seed, "removed": step.step, "units": str(removed)}
                row |= {"block_forwards": step.block_forwards, "commit": commit()}
                rows.append(row | self._judged(removed))
                self._note(f"{kind}, seed {seed}: {removed}")
        return rows

    def _judged(self, removed: Solution) -> dict[str, list[float]]:
        """Each sequence's mean loss, nats a token, by corpus, and the dense model's; what was judged once is read."""
        losses = dict[str, list[float]]()
        for corpus in CORPORA:
            for name, solution in ((corpus, removed), (f"{corpus}_dense", NOTHING)):
                key = {"corpus": corpus, "units": str(solution)}
                if self._judgements.find(**key) is None:
                    self._judgements.append(key | {"loss": self._measured(corpus, solution)})
                losses[name] = (self._judgements.find(**key) or {})["loss"]
        return losses

    def _measured(self, corpus: str, removed: Solution) -> list[float]:
        objective, loss = self._development(corpus), list[Tensor]()
        for batch in range(objective.batches):
            hidden = objective.start(batch)
            for op in removed.route(objective.blocks):
                hidden = objective.run(batch, op, hidden)
            loss.append(objective.losses(batch, hidden))
        return [round(x, 6) for x in torch.cat(loss).double().mean(1).tolist()]

    def _development(self, corpus: str) -> NextTokenLoss:
        if corpus not in self._texts:
            ids = self._text(corpus, "development", self._options.sequences, 0)
            self._texts[corpus] = NextTokenLoss(self._model, ids, self._options.prompt)
        return self._texts[corpus]

    def _text(self, corpus: str, split: Split, count: int, seed: int) -> Tensor:
        documents = registry.load(corpus, self._cache, self._note).split(split)
        return sequences(documents, self._tokenizer, count, self._options.length, seed)


if __name__ == "__main__":
    main()
