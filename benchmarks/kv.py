"""Quality for each byte of KV: every rule at every reduction -> results/kv.json, kv.svg. `make bench-kv`.

SmolLM2-135M, dequantised from Q4_1, in float32 behind a bfloat16 pool, no block removed. Plans are chosen on Brown's
calibration split and judged on its final split (and Social IQa) by the tasks of `pdtrim_deploy.evaluation`, all through
the PD oracle. Reductions are exact bytes at `--prompt` tokens against dense bfloat16 KV. An interrupted run goes on
where it was.

`--healed` adds what healing makes of two of our plans: decode, distilled behind the KV that they send, on text of the
calibration split. The plans are those of results/kv.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import asdict, replace
from typing import Any

from __kv_healed import HEALED, MORE, healed
from __kv_picture import draw
from __kv_plans import Row, rows
from __notes import timed_notes
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.tasks import Setting, agreement, choice, needle, perplexity
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.kvchoice.recall import with_recall
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan

CONTINUATION = 9  # of each calibration sequence: texts differ more than places in one
JUDGED = ("prompt", "sequences", "questions", "needles", "seed")  # options that every row's figures depend on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--reductions", type=float, nargs="+", default=[2, 3, 4.95, 8, 10, 12])
    parser.add_argument("--calibration", type=int, default=48, help="sequences that choose")
    parser.add_argument("--recall", type=float, default=0.25, help="share of them that repeat a passage at their end")
    parser.add_argument("--sequences", type=int, default=16, help="judged for perplexity")
    parser.add_argument("--questions", type=int, default=80, help="of choice")
    parser.add_argument("--needles", type=int, default=3, help="at each of ten depths")
    parser.add_argument("--random-seeds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=64, help="of healing")
    parser.add_argument("--text", type=int, default=256, help="sequences that heal")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--healed", action="store_true", help="judge dense and what is healed; other rows stay")
    parser.add_argument(
        "--ours", action="store_true", help="judge dense and ours again; other rules' rows stay, with their commit"
    )
    options = parser.parse_args()
    note = timed_notes()
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    tokenizer = load_tokenizer(checkpoint.path)
    model, plan = load_model(checkpoint.path), PDPlan.dense(checkpoint.shape("bfloat16"))
    dense, corpus = PDOracle(model, model, plan), registry.load("brown", Cache.default())
    key = [commit(), vars(options)]  # an interrupted run with the same options goes on where it was
    folder = (
        HERE.parent / "out" / "bench-kv" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    )
    log = RowLog(folder / "values.jsonl", key)

    def text(count: int, tokens: int, seed: int) -> Tensor:
        ids = sequences(corpus.split("calibration"), tokenizer, count, tokens, seed)
        return with_recall(ids, options.prompt, options.recall, options.seed)

    def chosen() -> list[dict[str, Any]]:
        ids = text(options.calibration, options.prompt + CONTINUATION, options.seed)
        problem = Problem(dense, ids, options.prompt, options.seed)
        return [_plain(row) for row in rows(problem, options.reductions, options.random_seeds, note, options.ours)]

    kept = committed(options) if options.ours or options.healed else []
    if options.healed:
        plans = [_row(row) for row in kept if (row["method"], row["asked"]) in (("dense", None), *HEALED)]
        ids = text(options.text, options.prompt + MORE, options.seed + 1)
        oracles = [dense, *(healed(dense.with_kv(row.sends), ids, options, folder, note) for row in plans[1:])]
        plans[1:] = [replace(row, method=f"{row.method}, healed") for row in plans[1:]]
    else:
        plans = [_row(row) for row in log.value("plans", chosen)]
        oracles = [dense.with_kv(row.sends) for row in plans]

    def setting(size: int) -> Setting:
        return Setting(tokenizer, dense, corpus.split("final"), Cache.default(), options.seed, size, note)

    lengths = tuple(dict.fromkeys((128, options.prompt, 2048)))
    tasks = (
        perplexity.prepare(setting(options.sequences), lengths),
        choice.prepare(setting(options.questions), options.prompt),
        needle.prepare(setting(options.needles), options.prompt),
        agreement.prepare(setting(options.sequences), options.prompt),
    )
    measured = {
        task.name: [
            Measured(task.name, tuple(item["groups"]), item["values"], tuple(item["subjects"]))
            for item in log.value(task.name, lambda task=task: [asdict(item) for item in task.measure(oracles, note)])
        ]
        for task in tasks
    }
    figures = [
        _figures(
            row, oracle.plan, options.prompt, {name: (results[at], results[0]) for name, results in measured.items()}
        )
        for at, (row, oracle) in enumerate(zip(plans, oracles, strict=True))
    ]
    for row in figures:
        note(
            "{method:24s} {reduction:5.2f}x  ppl {ppl_ratio:.4f}  choice {choice:.3f}  needle {needle:.2f}".format(
                **row
            )
        )
    if options.ours or options.healed:
        again = {row["method"] for row in figures}
        figures = (
            [row for row in figures if row["asked"] is None]
            + [row for row in kept if row["method"] not in again]
            + [row for row in figures if row["asked"] is not None]
        )
    draw(figures, write("kv", options, figures).with_suffix(".svg"))


def committed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results/kv.json, beside which others are to stand.

    Raises:
        SystemExit: they were judged on other text, while the table says one number of it for all.

    """
    result = json.loads((HERE / "results" / "kv.json").read_text())
    for name in JUDGED:
        if (before := result["options"].get(name)) != getattr(options, name):
            raise SystemExit(f"results/kv.json was judged with --{name} {before}: give that, or judge all rules again")
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def _figures(row: Row, plan: PDPlan, prompt: int, results: dict[str, tuple[Measured, Measured]]) -> dict[str, Any]:
    """One row of the results; `results` have each task's result and dense's."""
    (text, dense_text), (answers, dense_answers) = results["perplexity"], results["choice"]
    needles, greedy = results["needle"][0], results["agreement"][0]
    ratios = {group: text.against(dense_text, "nll", group) for group in dict.fromkeys(text.groups)}
    at = ratios[str(prompt)]
    return {
        "method": row.method,
        "asked": row.requested,
        "seed": row.seed,
        "bytes": plan.payload_bytes(prompt),
        "reduction": plan.reduction(prompt),
        "ppl_ratio": math.exp(at.mean),
        "ppl_ratio_stderr": math.exp(at.mean) * at.stderr,
        "ppl_ratio_by_prompt": {group: math.exp(ratio.mean) for group, ratio in ratios.items()},
        "reduction_by_prompt": {group: plan.reduction(int(group)) for group in ratios},
        "choice": answers.mean("accuracy_norm"),
        "choice_loss": answers.against(dense_answers, "right_nll").mean,
        "choice_loss_stderr": answers.against(dense_answers, "right_nll").stderr,
        "needle": needles.mean("exact"),
        "needle_choice": needles.mean("choice"),
        "needle_by_depth": needles.by_group("exact"),
        "agreement": greedy.mean("top1"),
        "agreement_prefix": greedy.mean("prefix"),
        "sends": [send.model_dump() for send in row.sends],
        "commit": commit(),
    }


def _row(row: dict[str, Any]) -> Row:
    return Row(row["method"], row["asked"], tuple(map(KVSend.model_validate, row["sends"])), row["seed"])


def _plain(row: Row) -> dict[str, Any]:
    sends = [send.model_dump() for send in row.sends]
    return {"method": row.method, "asked": row.requested, "seed": row.seed, "sends": sends}


if __name__ == "__main__":
    main()
