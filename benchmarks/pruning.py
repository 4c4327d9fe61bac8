"""Which blocks to lose: our search beside the others at 2, 4, 6 and 8 of 30 -> results/pruning.json, pruning.svg.

`make bench-pruning`. SmolLM2-135M, dequantised from Q4_1, in float32; decode loses so many blocks, prefill a third as
many; what only says where a gain comes from is asked at 4 and 6. Blocks are chosen on Brown's calibration split and
judged, through the PD oracle with whole KV, on Brown's final split and on Jane Austen (which no method ever saw), and
by Social IQa. Each row is written down when it is made and each search as it goes: run it in stretches, with parts of
--methods, --removed and --seeds; what is there, or among the committed results of the same sizes, is not made again,
and a method takes the blocks of another that chooses alike. Weights are fitted, healed and taught on --text sequences
that begin with those that choose.
"""

from __future__ import annotations

import argparse
from typing import Any

from __notes import timed_notes
from __pruning_choice import Setup, choose
from __pruning_methods import METHODS, prefill_blocks
from __pruning_picture import draw
from __pruning_rows import FITTED, SEARCHED, SHAPES, STEPS, Rows, folder
from __pruning_weights import stages, unified
from __results import HERE, commit, committed, write

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.perplexity import pd_perplexity
from pdtrim_deploy.evaluation.tasks import Setting, choice
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.pruning.pair import StagePair

CORPORA = ("brown", "austen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--removed", type=int, nargs="+", help="blocks; by default each method's own sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=16, help="sequences that choose")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of annealing, a stage")
    parser.add_argument("--text", type=int, default=96, help="sequences that weights are fitted to")
    parser.add_argument("--training-steps", type=int, default=30, help="of healing, a stage")
    parser.add_argument("--sequences", type=int, default=24, help="judged, of each corpus")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--questions", type=int, default=100, help="of Social IQa")
    parser.add_argument("--search-only", action="store_true", help="choose blocks, judge nothing")
    options = parser.parse_args()
    note = timed_notes()
    results = HERE / "results" / "pruning.json"
    rows = Rows(folder(options, SHAPES) / "rows.jsonl", committed(results, options, SHAPES))
    bench: _Bench | None = None
    for removed in options.removed or METHODS["ours"].sizes:
        for name in options.methods:
            if not options.removed and removed not in METHODS[name].sizes:
                continue
            for seed in options.seeds if METHODS[name].seeded else [0]:
                if not rows.has(name, removed, seed):
                    bench = bench or _Bench(options, note)
                    rows.add(bench.row(rows, name, removed, seed, judge=not options.search_only))
    if not rows.has("dense", 0, 0) and not options.search_only:
        rows.add((bench or _Bench(options, note)).dense())
    written = rows.read()
    if written:
        draw(written, write("pruning", options, written).with_suffix(".svg"))


class _Bench:
    """The model, the text to choose by, the text to judge by: loaded once, when a row is to be made."""

    def __init__(self, options: argparse.Namespace, note: Any) -> None:
        checkpoint, cache = resolve(DEFAULT_SOURCE, Cache.default()), Cache.default()
        tokenizer, model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)
        shape, corpora = checkpoint.shape("float32"), {name: registry.load(name, cache) for name in CORPORA}
        count = max(options.calibration, options.text)
        text = sequences(corpora["brown"].split("calibration"), tokenizer, count, options.length)
        self._fitted = folder(options, FITTED)
        self.setup = Setup(
            model,
            shape,
            text[: options.calibration],
            text[: options.text],
            options.steps,
            options.training_steps,
            folder(options, SEARCHED),
            note,
        )
        self._prompt, self._note = options.prompt, note
        tokens = options.prompt + options.continuation
        self._text = {
            name: sequences(corpus.split("final"), tokenizer, options.sequences, tokens)
            for name, corpus in corpora.items()
        }
        oracle = PDOracle(model, model, PDPlan.dense(shape))
        setting = Setting(tokenizer, oracle, corpora["brown"].split("final"), cache, 0, options.questions, note)
        self._choice = choice.prepare(setting, options.prompt)

    def dense(self) -> dict[str, Any]:
        pair = StagePair(self.setup.model, PDPlan.dense(self.setup.shape))
        return {"method": "dense", "removed": 0, "seed": 0, "trained": False} | self._judged(pair)

    def row(self, rows: Rows, name: str, removed: int, seed: int, judge: bool) -> dict[str, Any]:
        chosen, method = choose(self.setup, name, removed, seed, rows.chosen(name, removed, seed)), METHODS[name]
        about = {"method": name, "removed": removed, "prefill_removed": prefill_blocks(removed), "seed": seed}
        row: dict[str, Any] = about | {"trained": method.trained} | chosen.as_row | {"commit": commit()}
        self._note(f"{name}, {removed} blocks, seed {seed}: {row['prefill']} | {row['decode']}")
        if judge and (same := rows.alike(row)):
            row |= same
        elif judge:
            pair, row["fit_seconds"] = stages(self.setup, method, chosen, self._fitted / "weights")
            row |= self._judged(pair) | {"unified_ppl": self._ppl(unified(pair), "brown"), "judged_at": commit()}
        if judge:
            self._note(
                f"{name}, {removed} blocks, seed {seed}: Brown {row['brown_ppl']:.2f}, Austen {row['austen_ppl']:.2f}"
            )
        return row

    def _judged(self, pair: StagePair) -> dict[str, Any]:
        judged = {f"{name}_ppl": self._ppl(pair, name) for name in CORPORA}
        measured = self._choice.measure([self._oracle(pair)], self._note)[0]
        return judged | {"choice": measured.mean("accuracy_norm"), "choice_loss": measured.mean("right_nll")}

    def _ppl(self, pair: StagePair, corpus: str) -> float:
        return pd_perplexity(self._oracle(pair), self._text[corpus], self._prompt).ppl

    @staticmethod
    def _oracle(pair: StagePair) -> PDOracle:
        return PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)


if __name__ == "__main__":
    main()
