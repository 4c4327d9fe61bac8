"""Choice accuracy on all questions of Social IQa, for some of bench-kv's plans -> results/choice.json.

`make bench-choice`. `make bench-kv` asks 80 questions, whose accuracy is known to five points only; here some of the
plans that it left in results/kv.json are asked all of them. Differences are paired, question by question, with dense
and with StreamingLLM at 4.95x.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from __notes import timed_notes
from __results import HERE, write

from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.tasks import Setting, choice
from pdtrim_deploy.evaluation.tasks.social_iqa import load
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan

BESIDE = ("StreamingLLM", 4.95)
PLANS = (("dense", None), BESIDE, ("ours", 4.95), ("ours", 10.0))
MEASURES = ("accuracy_norm", "accuracy", "right_nll")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, help="by default all")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    note = timed_notes()
    known = json.loads((HERE / "results" / "kv.json").read_text())["rows"]
    plans = [next(row for row in known if (row["method"], row["asked"]) == plan) for plan in PLANS]
    checkpoint, cache = resolve(DEFAULT_SOURCE, Cache.default()), Cache.default()
    model = load_model(checkpoint.path)
    dense = PDOracle(model, model, PDPlan.dense(checkpoint.shape("bfloat16")))
    oracles = [dense.with_kv(tuple(map(KVSend.model_validate, row["sends"]))) for row in plans]
    questions = load(cache, note)
    setting = Setting(
        load_tokenizer(checkpoint.path), dense, (), cache, options.seed, options.questions or len(questions[1]), note
    )
    results = choice.prepare(setting, options.prompt, questions).measure(oracles, note)
    beside = results[PLANS.index(BESIDE)]
    rows = [_row(row, result, results[0], beside) for row, result in zip(plans, results, strict=True)]
    for row in rows:
        print(row)
    write("choice", options, rows)


def _row(plan: dict[str, Any], result: Measured, dense: Measured, beside: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {key: plan[key] for key in ("method", "asked", "reduction", "ppl_ratio", "needle")}
    row |= {"questions": len(result.groups)} | {measure: result.mean(measure) for measure in MEASURES}
    for name, other in (("dense", dense), ("StreamingLLM at 4.95x", beside)):
        for measure in MEASURES:
            difference = result.against(other, measure)
            row[f"{measure} against {name}"] = {"mean": difference.mean, "stderr": difference.stderr}
    return row


if __name__ == "__main__":
    main()
