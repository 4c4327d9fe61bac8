"""Quality of plans beside the dense model: perplexity of three kinds of text, HellaSwag, GSM8K -> quality.json.

`make bench-quality`. Each plan is built from a recipe (mixed calibration text) and judged on the PD oracle in float32:
likelihoods with hand-over `decode`, texts with `served`. Perplexity is of final splits. Values of every question are
written down as they come (out/bench-quality), and the benchmark goes on from there: `--models`, `--plans`, `--parts`
and `--items` choose what a run does, the table has all that was ever measured of the same texts. A row names its own
commit and machine; rows of several commits are not paired. "KV-only prefill, tail of 32" is
units/healing/kv-only-10-tail; the other two with a tail are former units (128 tokens, and 12 blocks).
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from __notes import Note, timed_notes
from __quality_plans import DENSE, MIXED, MODELS, ONLY, PLANS, built
from __quality_tasks import TASKS, write_tasks
from __results import HERE, commit, committed, write
from __savings import bfloat16_reduction

from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import windows
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.perplexity import BATCH
from pdtrim_deploy.evaluation.recovery import Recovery
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
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
    log, note = RowLog(PLACE / "rows.jsonl", text), timed_notes()
    now = commit()
    for name in options.models:
        missing = [
            (part, plan)
            for part in options.parts
            for plan in options.plans
            if ONLY.get(plan, name) == name
            and not _covers(log.find(model=name, part=part, plan=plan), part, options.items)
        ]
        for part in dict.fromkeys(part for part, _ in missing):
            there = [row for row in _newest(log) if (row["model"], row["part"]) == (name, part)]
            check_commits([*there, {"commit": now}])
        for family in families(dict.fromkeys(plan for _, plan in missing)):
            bench = _Bench(name, family, text, note)
            for part in options.parts:
                plans = [plan for of_part, plan in missing if of_part == part and plan in family]
                for rows_of in bench.rows(part, plans, options.items):
                    log.append(*rows_of)
    options.models, options.plans, options.parts, options.items = [*MODELS], [*PLANS], [*DOMAINS, *TASKS], None
    older = committed(HERE / "results" / "quality.json", options, text)
    measured = {_key(row): row for row in (*older, *rows(log))}
    write("quality", options, [measured[key] for key in _order() if key in measured])


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
            Measured(
                row["part"],
                ("all",) * count,
                {row["measure"]: tuple(side["values"][:count])},
                tuple(side.get("documents", ())[:count]),
            )
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
    newest = {_key(row): row for row in log.rows}
    return [newest[key] for key in _order() if key in newest]


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["part"], row["plan"]


def _order() -> list[tuple[str, str, str]]:
    return [(model, part, plan) for model in MODELS for part in (*DOMAINS, *TASKS) for plan in PLANS]


def families(plans: Collection[str]) -> list[list[str]]:
    """Plans of the same weights together, which prefill texts once for all of them: those that cut KV alone."""
    kv_alone = [plan for plan in plans if set(PLANS[plan]) == {"kv"}]
    return [family for family in (kv_alone, *([plan] for plan in plans if plan not in kv_alone)) if family]


class _Bench:
    """One model behind plans of the same weights."""

    def __init__(self, name: str, plans: Sequence[str], text: dict[str, int], note: Note) -> None:
        self._name, self._text, self._note, self._cache = name, text, note, Cache.default()
        self._oracles, self._commit = dict[str, PDOracle](), commit()
        for plan in plans:
            with built(name, MIXED | PLANS[plan], PLACE / name) as bundle:
                if not self._oracles:
                    first = oracle_of(bundle, note, None)
                    self._tokenizer = load_tokenizer(bundle.prefill_dir)
                offsets = KeyOffsets.read(bundle.prefill_dir, bundle.plan)
                self._oracles[plan] = PDOracle(first.prefill_model, first.decode_model, bundle.plan, offsets)
        self._tasks = write_tasks(PLACE / "tasks", self._cache)

    def rows(self, part: str, plans: Sequence[str], items: int | None) -> Iterator[list[dict[str, Any]]]:
        """A row of each plan, as they are measured: a value for each question or text, with what made it."""
        if plans and part in DOMAINS:
            values, documents = self._domain(part, plans)
            rows = [self._row(plan, part, "nll", values[plan], every=True) for plan in plans]
            yield [row | {"documents": documents} for row in rows]
        for plan in plans if part in TASKS else ():
            measured, every = self._task(plan, part, items)
            yield [self._row(plan, part, TASKS[part], measured.values[TASKS[part]], every=every)]

    def _row(self, plan: str, part: str, measure: str, values: Sequence[float], *, every: bool) -> dict[str, Any]:
        """Bytes are compared with a bfloat16 pool."""
        row = {"model": self._name, "plan": plan, "part": part, "measure": measure, "all": every}
        row |= {"values": [round(value, 6) for value in values]}
        row |= {"reduction": bfloat16_reduction(self._oracles[plan].plan, self._text["prompt"]), "commit": self._commit}
        return row | {"machine": machine()["cpu"]}

    def _domain(self, part: str, plans: Sequence[str]) -> tuple[dict[str, list[float]], list[int]]:
        """Loss of each text behind each plan, and the document of each text; one batch's prompts are in memory."""
        documents = registry.load(DOMAINS[part], self._cache, self._note).split("final")
        lengths = self._text["prompt"], self._text["continuation"]
        texts = windows(documents, self._tokenizer, self._text["sequences"], sum(lengths), 0)
        values: dict[str, list[float]] = {plan: [] for plan in plans}
        for batch in texts.ids.split(BATCH):
            prompts, continuations = batch.split(lengths, 1)
            state = self._oracles[plans[0]].prefill(prompts)
            for plan in plans:
                values[plan] += sequence_nll(self._oracles[plan].score(state, continuations)).tolist()
            self._note(f"{self._name}, {part}: {len(values[plans[0]])} of {len(texts.ids)} texts, {len(plans)} plans")
        return values, list(texts.documents)

    def _task(self, plan: str, part: str, items: int | None) -> tuple[Measured, bool]:
        self._note(f"{self._name}, {plan}, {part}")
        samples, oracle = PLACE / "samples" / self._name / plan.replace(" ", "-"), self._oracles[plan]
        (result,) = Harness((part,), self._tasks, items).measure(oracle, self._tokenizer, samples, self._note)
        return result, len(result.groups) == len(Path(self._tasks, f"{part}.jsonl").read_text().splitlines())


if __name__ == "__main__":
    main()
