"""KV rules at equal bytes, all behind quantised rows -> results/equalbytes.json. `make bench-equalbytes`.

    uniform W            all rows in wire dtype W, at the reduction that this gives
    budget Rx            rows and dtype of each layer, chosen by the solver; rows as shares of the prompt
    StreamingLLM W, Rx   the first 4 rows and the last ones, as a share of the prompt, one number for all layers

All have the same key offsets and scales. The budget plan alone is chosen on text: the default mixture, a quarter of its
sequences with a passage repeated at their end. Effects are measured once for all budgets. As shares, plans keep their
reduction within 5 % at prompts of 128 tokens and more. All are judged behind one prefill, on the PD oracle in float32
behind a bfloat16 pool: continuations of the final split of prose, code and agents' conversations, and needles. Values
of every text are kept, so that differences are paired, and the benchmark goes on from there (out/bench-equalbytes). The
file keeps the rows of other models, whatever their commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from __notes import timed_notes
from __quality_plans import MODELS
from __results import HERE, commit, committed, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.mixture import in_turn, mixed
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.tasks import Setting, needle, perplexity
from pdtrim_deploy.evaluation.tasks.base import Task
from pdtrim_deploy.kvchoice import Problem, Sends, offsets
from pdtrim_deploy.kvchoice.by_harm import budget_search
from pdtrim_deploy.kvchoice.recall import with_recall
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.kv import SHARE_UNIT, KVSend
from pdtrim_deploy.recipe.calibration import DEFAULT_MIXTURE
from pdtrim_deploy.recipe.kv import KVSection, cut_to

CHOSEN_AT, CONTINUATION, FIRST, RECALL = 512, 9, 4, 0.25
ROUNDS = 0  # of measuring effects again about an answer, which would take minutes for each budget
PLACE = HERE.parent / "out" / "bench-equalbytes"
WIRES = ("int4", "k4v3", "int3")
LENGTHS = (512, 2048, 8064)
SHORT = (("brown", 512), ("code", 512), ("agents", 512))
LONG = (("austen", 2048), ("agents", 2048))
LONGEST = ("agents", 8064)  # with its continuation within SmolLM2's 8,192 positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--reductions", type=float, nargs="+", default=[4.95, 10.0])
    parser.add_argument("--calibration", type=int, default=24, help="sequences that choose")
    parser.add_argument("--texts", type=int, default=48, help="of each kind behind 512 tokens")
    parser.add_argument("--long", type=int, default=12, help="of each kind behind 2,048 tokens")
    parser.add_argument("--longest", type=int, default=4, help="behind 8,064 tokens; 0: none")
    parser.add_argument("--needles", type=int, default=6, help="at each of ten depths")
    options = parser.parse_args()
    note = timed_notes()
    log = RowLog(PLACE / "values.jsonl", [vars(options), commit()])
    bench = _Bench(options, note)
    plans = {name: tuple(map(KVSend.model_validate, sends)) for name, sends in log.value("plans", bench.plans).items()}
    oracles = [bench.oracle.with_kv(sends) for sends in plans.values()]
    measured = {
        name: log.value(name, lambda task=task: [_values(result) for result in task.measure(oracles, note)])
        for name, task in bench.tasks()
    }
    about = {"model": options.model, "commit": commit()}
    older = committed(HERE / "results" / "equalbytes.json", options, ())
    rows = [row for row in older if row["model"] != options.model]
    for at, (name, sends) in enumerate(plans.items()):
        plan = bench.oracle.plan.with_kv(sends)
        row = {"plan": name, "reduction": {tokens: round(plan.reduction(tokens), 4) for tokens in LENGTHS}}
        row["sends"] = [send.model_dump() for send in sends]
        rows.append(about | row | {"values": {task: results[at] for task, results in measured.items()}})
    write("equalbytes", options, rows)


class _Bench:
    """The unpruned model with its key offsets, and the text that rules are chosen and judged on."""

    def __init__(self, options: argparse.Namespace, note: Any) -> None:
        self._options, self._note, self._cache = options, note, Cache.default()
        unit = HERE.parent / "recipes" / "units" / "model" / f"{MODELS[options.model]}.yaml"
        checkpoint = resolve(yaml.safe_load(unit.read_text())["model"]["source"], self._cache, note)
        self._tokenizer, model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)
        dense = PDOracle(model, model, PDPlan.dense(checkpoint.shape("bfloat16")))
        measured = offsets.measure(dense, self._calibration(CHOSEN_AT), note)
        self.oracle = dense.with_offsets(measured.offsets)

    def _calibration(self, length: int) -> Tensor:
        parts = [
            (registry.load(part.corpus, self._cache, self._note).split("calibration"), part.share)
            for part in DEFAULT_MIXTURE
        ]
        return mixed(parts, self._tokenizer, self._options.calibration, length)

    def plans(self) -> dict[str, list[dict[str, Any]]]:
        """Rules of each plan, dense first."""
        layers, options = len(self.oracle.plan.kv), KVSection(method="budget", reduction=2.0).options()
        parts = in_turn([part.share for part in DEFAULT_MIXTURE], self._options.calibration)
        ids = with_recall(self._calibration(CHOSEN_AT + CONTINUATION), CHOSEN_AT, RECALL, 0, parts)
        problem = Problem(self.oracle, ids, CHOSEN_AT)
        search = budget_search(problem, tuple(map(_shared, options)), self._note, ROUNDS)
        budget = self.oracle.plan.dense_bytes(CHOSEN_AT)
        plans: dict[str, Sends] = {"dense": (KVSend(),) * layers}
        plans |= {f"uniform {wire}": (KVSend(wire_dtype=wire),) * layers for wire in WIRES}
        for reduction in self._options.reductions:
            plans[f"budget {reduction:g}x"] = search.within(int(budget / reduction)).sends
            for wire in WIRES:
                plans[f"StreamingLLM {wire}, {reduction:g}x"] = self._streaming(wire, reduction)
        return {name: [send.model_dump() for send in sends] for name, sends in plans.items()}

    def _streaming(self, wire: Any, reduction: float) -> Sends:
        """The most rows of every layer that give the reduction at the length chosen at, or all, as a share."""
        plan, layers = self.oracle.plan, len(self.oracle.plan.kv)
        all_rows = (KVSend(wire_dtype=wire),) * layers
        if plan.with_kv(all_rows).reduction(CHOSEN_AT) >= reduction:
            return all_rows
        cuts = (cut_to(FIRST, rows - FIRST, wire_dtype=wire) for rows in range(CHOSEN_AT - 1, FIRST, -1))
        cut = next(cut for cut in cuts if plan.with_kv((cut,) * layers).reduction(CHOSEN_AT) >= reduction)
        return (_shared(cut),) * layers

    def tasks(self) -> Iterator[tuple[str, Task]]:
        """Texts of each kind behind each length, and needles."""
        options = self._options
        kinds = [(kind, options.texts) for kind in SHORT] + [(kind, options.long) for kind in LONG]
        for (corpus, tokens), count in [*kinds, (LONGEST, options.longest)]:
            if count:
                yield f"{corpus} {tokens}", perplexity.prepare(self._setting(corpus, count), (tokens,))
        yield f"needle {CHOSEN_AT}", needle.prepare(self._setting("brown", options.needles), CHOSEN_AT)

    def _setting(self, corpus: str, size: int) -> Setting:
        documents = registry.load(corpus, self._cache, self._note).split("final")
        return Setting(self._tokenizer, self.oracle, documents, self._cache, 0, size, self._note)


def _values(result: Measured) -> dict[str, Sequence[float]]:
    """Each measure's values, and which texts are of one document."""
    return result.values | ({"documents": result.subjects} if result.subjects else {})


def _shared(send: KVSend) -> KVSend:
    """As many rows at the length chosen at, as a share of the prompt with a quarter of them as the least number."""
    if send.mode != "sparse":
        return send
    rows = send.n_first + send.n_last
    share = rows * SHARE_UNIT // CHOSEN_AT
    return cut_to(send.n_first, max(1, rows // 4 - send.n_first), share, wire_dtype=send.wire_dtype)


if __name__ == "__main__":
    main()
