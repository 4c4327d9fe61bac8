"""Fixed rows against a share of the prompt at equal bytes -> results/shares.json. `make bench-shares`.

SmolLM2-135M, dequantised from Q4_1, in float32 behind a bfloat16 pool, no block removed; every layer's wire is k4v3, so
that plans differ in rows alone. Three plans by the same solver, for the same reduction:

    fixed at 512    numbers of rows, effects measured at the first length alone: what a recipe with one length makes
    fixed           numbers of rows, effects measured at all lengths, as many bytes as `share` over one request of each
    share           shares of the prompt with least numbers, effects measured at all lengths

Chosen on Brown's calibration split, a quarter of its sequences with a passage that is repeated, and judged on its
development split: each sequence's mean loss, so that differences are paired. What was measured is kept, and an
interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.kvchoice import Problem, Sends
from pdtrim_deploy.kvchoice.budget.lengths import MeanMeasure
from pdtrim_deploy.kvchoice.budget.search import BudgetSearch
from pdtrim_deploy.kvchoice.recall import with_recall
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.recipe.kv import cut_to

WIRE = "k4v3"
WHOLE = KVSend(wire_dtype=WIRE)
FIXED = tuple(cut_to(4, rows - 4, wire_dtype=WIRE) for rows in (20, 100, 256, 512, 1024))
SHARES = tuple(cut_to(4, share // 4 - 4, share, wire_dtype=WIRE) for share in (40, 200, 512))  # least at 256 tokens
OPTIONS = (WHOLE, *FIXED, *SHARES)
FORBIDDEN = 1 << 50  # the sum over layers still fits 64 bits
PLACE = HERE.parent / "out" / "bench-shares"
Note = Callable[[str], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="prompt tokens, ascending")
    parser.add_argument("--reduction", type=float, default=8.0)
    parser.add_argument("--calibration", type=int, default=8, help="sequences of each length that choose")
    parser.add_argument("--chosen-on", type=int, default=17, help="tokens of their continuations")
    parser.add_argument("--sequences", type=int, default=12, help="judged at each length")
    parser.add_argument("--judged", type=int, default=65, help="tokens of their continuations")
    options = parser.parse_args()
    started, cpu = time.monotonic(), time.process_time()

    def note(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {time.process_time() - cpu:6.0f} CPU s  {line}", flush=True)

    PLACE.mkdir(parents=True, exist_ok=True)
    log = RowLog(PLACE / "values.jsonl", vars(options))
    bench = _Bench(options, note)
    plans = {
        name: tuple(map(KVSend.model_validate, sends))
        for name, sends in log.value("plans", lambda: bench.chosen(log)).items()
    }
    rows = []
    for tokens in options.lengths:
        loss = log.value(f"judged at {tokens}", lambda tokens=tokens: bench.judged(plans, tokens))
        for name, sends in plans.items():
            plan = bench.oracle.with_kv(sends).plan
            size = {"bytes": plan.payload_bytes(tokens), "reduction": plan.reduction(tokens)}
            rows.append({"plan": name, "prompt_tokens": tokens} | size | {"loss": loss[name], "dense": loss["dense"]})
            rows[-1] |= {"sends": [send.model_dump() for send in sends], "commit": commit()}
    write("shares", options, rows)


class _Bench:
    """The model and its texts; both are loaded when they are first needed."""

    def __init__(self, options: argparse.Namespace, note: Note) -> None:
        self._options, self._note = options, note
        checkpoint = resolve(DEFAULT_SOURCE, Cache.default(), note)
        model, plan = load_model(checkpoint.path), PDPlan.dense(checkpoint.shape("bfloat16"))
        self.oracle, self._tokenizer = PDOracle(model, model, plan), load_tokenizer(checkpoint.path)
        self._corpus = registry.load("brown", Cache.default(), note)

    def chosen(self, log: RowLog) -> dict[str, Any]:
        """The plans by name, as JSON."""

        def memo(name: str, make: Callable[[], Tensor]) -> Tensor:
            return torch.tensor(log.value(f"effects {name}", lambda: make().tolist()), dtype=torch.float64)

        first, *longer = (replace(self._problem(tokens), memo=memo) for tokens in self._options.lengths)
        every = MeanMeasure.of(replace(first, longer=tuple(longer)), OPTIONS, self._note)
        alone = MeanMeasure(first, every.measures[:1])
        lengths, plan = self._options.lengths, self.oracle.plan
        of_option, layers = [plan.with_kv((option,) * len(plan.kv)) for option in OPTIONS], range(len(plan.kv))
        at = [np.array([[each.layer_bytes(layer, n) for each in of_option] for layer in layers]) for n in lengths]
        scaled = np.array([[each.layer_cost(layer, lengths) for each in of_option] for layer in layers])

        def solved(measure: MeanMeasure, allowed: tuple[KVSend, ...], costs: Any, budget: int) -> Sends:
            usable = [option in (WHOLE, *allowed) for option in OPTIONS]
            return BudgetSearch(measure, np.where(usable, costs, FORBIDDEN), self._note, rounds=0).within(budget).sends

        budget = int(plan.dense_bytes(lengths[0]) / self._options.reduction)
        share = solved(every, SHARES, scaled, budget)
        total = sum(plan.with_kv(share).payload_bytes(n) for n in lengths)
        plans = {
            "fixed at 512": solved(alone, FIXED, at[0], budget),
            "fixed": solved(every, FIXED, sum(at), total),
            "share": share,
        }
        return {name: [send.model_dump() for send in sends] for name, sends in plans.items()}

    def judged(self, plans: dict[str, Sends], tokens: int) -> dict[str, list[float]]:
        """Each sequence's mean loss in nats a token, by plan; the first token, which prefill gives, does not count."""
        ids = self._text("development", self._options.sequences, tokens + self._options.judged)
        loss: dict[str, list[float]] = {}
        for row in ids.split(1):
            state = self.oracle.prefill(row[:, :tokens])
            for name, sends in {"dense": (KVSend(),) * len(self.oracle.plan.kv), **plans}.items():
                scores = self.oracle.with_kv(sends).score(state, row[:, tokens:])[0, 1:]
                loss.setdefault(name, []).append(round(-float(scores.double().mean()), 6))
        self._note(f"judged at {tokens} prompt tokens")
        return loss

    def _problem(self, tokens: int) -> Problem:
        ids = self._text("calibration", self._options.calibration, tokens + self._options.chosen_on)
        return Problem(self.oracle, with_recall(ids, tokens, 0.25, 0), tokens, work=PLACE)

    def _text(self, split: Any, count: int, length: int) -> Tensor:
        return sequences(self._corpus.split(split), self._tokenizer, count, length, 0)


if __name__ == "__main__":
    main()
