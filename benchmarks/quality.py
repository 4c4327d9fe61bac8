"""Quality of plans beside the dense model: perplexity of three kinds of text, HellaSwag, GSM8K -> quality.json.

`make bench-quality`. Each plan is built from a recipe (mixed calibration text) and judged on the PD oracle in float32:
likelihoods with hand-over `decode`, texts with `served`. Perplexity is of final splits. Values of every question are
written down as they come (out/bench-quality), and the benchmark goes on from there: `--models`, `--plans`, `--parts`
and `--items` choose what a run does, the table has all that was ever measured of the same texts. A row names its own
commit and machine; rows of several commits are not paired.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from __quality_plans import DENSE, MIXED, MODELS, PLANS, built
from __quality_tasks import TASKS, write_tasks
from __results import HERE, commit, write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.perplexity import BATCH
from pdtrim_deploy.evaluation.recovery import Recovery
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.models.pd_run import sequence_nll

DOMAINS = {"prose": "brown", "dialogue": "agents", "code": "code"}
PLACE = HERE.parent / "out" / "bench-quality"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL")
    parser.add_argument("--plans", nargs="+", default=[*PLANS], choices=PLANS, metavar="PLAN")
    parser.add_argument("--parts", nargs="+", default=[*DOMAINS, *TASKS], choices=[*DOMAINS, *TASKS])
    parser.add_argument("--items", type=int, help="questions of each task, the first  [default: all]")
    parser.add_argument("--sequences", type=int, default=256, help="texts of each domain")
    parser.add_argument("--prompt", type=int, default=448, help="tokens of prompt")
    parser.add_argument("--continuation", type=int, default=128, help="tokens judged behind it")
    options = parser.parse_args()
    text = {name: getattr(options, name) for name in ("sequences", "prompt", "continuation")}
    log, started = RowLog(PLACE / "rows.jsonl", text), time.monotonic()

    def note(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    now = commit()
    for name in options.models:
        missing = [
            (part, plan)
            for part in options.parts
            for plan in options.plans
            if not _covers(log.find(model=name, part=part, plan=plan), part, options.items)
        ]
        for part in dict.fromkeys(part for part, _ in missing):
            there = [row for row in _newest(log) if (row["model"], row["part"]) == (name, part)]
            check_commits([*there, {"commit": now}])
        prompts: dict[str, list[PrefillState]] = {}
        for plan in dict.fromkeys(plan for _, plan in missing):
            with built(name, MIXED | PLANS[plan], PLACE / name, note) as bundle:
                bench = _Bench(name, plan, bundle, text, prompts if set(PLANS[plan]) == {"kv"} else {}, note)
                for part in (part for part, of_plan in missing if of_plan == plan):
                    log.append(bench.row(part, options.items))
    options.models, options.plans, options.parts, options.items = [*MODELS], [*PLANS], [*DOMAINS, *TASKS], None
    write("quality", options, [*rows(log)])


def _covers(row: dict[str, Any] | None, part: str, items: int | None) -> bool:
    """Whether a row has as many questions as are wanted; all of them, where no number is given."""
    return row is not None and (part in DOMAINS or row["all"] or (items is not None and len(row["values"]) >= items))


def check_commits(rows: Iterable[dict[str, Any]]) -> None:
    """UserError where rows that are to be paired are of several commits."""
    commits = dict.fromkeys(str(row["commit"]) for row in rows)
    if len(commits) > 1:
        raise UserError(
            f"rows of commits {' and '.join(commits)} do not pair; check out the first of them, or remove "
            f"{(PLACE / 'rows.jsonl').relative_to(HERE.parent)} and measure all at one commit"
        )


def rows(log: RowLog) -> Iterator[dict[str, Any]]:
    """Each plan against dense on the questions that both have."""
    for row in _newest(log):
        dense = log.find(model=row["model"], part=row["part"], plan=DENSE)
        if row["plan"] == DENSE or dense is None:
            continue
        check_commits([dense, row])
        count = min(len(row["values"]), len(dense["values"]))
        before, after = (
            Measured(row["part"], ("all",) * count, {row["measure"]: tuple(side["values"][:count])})
            for side in (dense, row)
        )
        kept = Recovery.of(before, after, {})
        yield {
            "model": row["model"],
            "plan": row["plan"],
            "part": row["part"],
            "measure": row["measure"],
            "n": count,
            "dense": kept.dense,
            "score": kept.score,
            "recovery": kept.recovery,
            "se": kept.stderr,
            "reduction": row["reduction"],
            "commit": row["commit"],
            "machine": row["machine"],
        }


def _newest(log: RowLog) -> list[dict[str, Any]]:
    newest = {(row["model"], row["part"], row["plan"]): row for row in log.rows}
    order = [(m, part, plan) for m in MODELS for part in (*DOMAINS, *TASKS) for plan in PLANS]
    return [newest[key] for key in order if key in newest]


class _Bench:
    """One model behind one plan. `prompts`: by domain, what prefill made of its texts, for plans of this prefill."""

    def __init__(
        self,
        name: str,
        plan: str,
        bundle: Bundle,
        text: dict[str, int],
        prompts: dict[str, list[PrefillState]],
        note: Callable[[str], None],
    ) -> None:
        self._prompts = prompts
        self._name, self._plan, self._text, self._note, self._cache = name, plan, text, note, Cache.default()
        self._oracle, self._tokenizer = oracle_of(bundle, note, None), load_tokenizer(bundle.prefill_dir)
        self._tasks, self._commit = write_tasks(PLACE / "tasks", self._cache), commit()

    def row(self, part: str, items: int | None) -> dict[str, Any]:
        """A value for each question or text, with what made it. Bytes are compared with a bfloat16 pool."""
        self._note(f"{self._name}, {self._plan}, {part}")
        measured, every = self._domain(part) if part in DOMAINS else self._task(part, items)
        name = "nll" if part in DOMAINS else TASKS[part]
        row = {"model": self._name, "plan": self._plan, "part": part, "measure": name, "all": every}
        row |= {"values": [round(value, 6) for value in measured.values[name]]}
        row |= {"reduction": _saved(self._oracle, self._text["prompt"]), "commit": self._commit}
        return row | {"machine": machine()["cpu"]}

    def _domain(self, part: str) -> tuple[Measured, bool]:
        documents = registry.load(DOMAINS[part], self._cache, self._note).split("final")
        length = self._text["prompt"] + self._text["continuation"]
        ids = sequences(documents, self._tokenizer, self._text["sequences"], length, 0)
        lengths = self._text["prompt"], self._text["continuation"]
        prompts, continuations = (side.split(BATCH) for side in ids.split(lengths, 1))
        if part not in self._prompts:
            self._prompts[part] = [self._oracle.prefill(batch) for batch in prompts]
        values = tuple(
            value
            for state, batch in zip(self._prompts[part], continuations, strict=True)
            for value in sequence_nll(self._oracle.score(state, batch)).tolist()
        )
        return Measured(part, ("all",) * len(values), {"nll": values}), True

    def _task(self, part: str, items: int | None) -> tuple[Measured, bool]:
        samples = PLACE / "samples" / self._name / self._plan.replace(" ", "-")
        (result,) = Harness((part,), self._tasks, items).measure(self._oracle, self._tokenizer, samples, self._note)
        return result, len(result.groups) == len(Path(self._tasks, f"{part}.jsonl").read_text().splitlines())


def _saved(oracle: PDOracle, tokens: int) -> float:
    """Dense over the plan's bytes, both of a bfloat16 pool; dense bytes of that are twice those of one in fp8."""
    native = all(send.wire_dtype == "native" for send in oracle.plan.kv)
    return oracle.plan.reduction(tokens) if native else 2 * oracle.plan.reduction(tokens, "fp8_e4m3")


if __name__ == "__main__":
    main()
