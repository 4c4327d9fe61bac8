"""Generated answers through genuine pairs: HumanEval, GSM8K, instructions about form -> results/generated.json.

`make bench-generated`. Qwen2.5-Coder-0.5B, dequantised from Q4_K_M to float32. A plan cuts KV alone, or blocks alone,
refitted by least squares on the default calibration text; it is built, served by SGLang's workers behind its router,
and asked every question once, greedily. What a plan answered is written down when a task is through
(out/bench-generated), and the benchmark goes on from there: `--plans` and `--tasks` choose what a run does, the table
has all that was ever asked at these `--items` and `--max-tokens`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from __built import built
from __notes import timed_notes
from __results import HERE, commit, committed, write
from __savings import bfloat16_reduction

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.evaluation.generated import TASKS
from pdtrim_deploy.evaluation.generated.base import Setting
from pdtrim_deploy.evaluation.generated.sgl_eval import ask
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import WorkerOptions, cluster_of

DENSE, ASKED_AT = "dense", 512
PLANS: dict[str, dict[str, Any]] = {
    DENSE: {"method": "none"},
    "uniform int4": {"method": "none", "wire_dtype": "int4"},
    "uniform k4v3": {"method": "none", "wire_dtype": "k4v3"},
    "uniform int3": {"method": "none", "wire_dtype": "int3"},
    "uniform k4v3, keys whole": {"method": "none", "wire_dtype": "k4v3", "key_offsets": False},
    "budget 4.95x": {"method": "budget", "reduction": 9.9, "prompt_tokens": ASKED_AT},
    "budget 8x": {"method": "budget", "reduction": 16.0, "prompt_tokens": ASKED_AT},
}
"""`kv` of each plan's recipe; key offsets are subtracted unless it says no. Reductions are of the recipe's float32
pool, twice those of a bfloat16 one."""
REFIT = {"compensation": "least-squares", "sequences": 64}
BLOCKS: dict[str, dict[str, Any]] = {
    "6 of 24 blocks K and V alone in prefill": {"healing": {**REFIT, "kv_only_blocks": 6}},
    "6 of 24 blocks K and V alone in prefill, tail of 64 tokens": {
        "healing": {**REFIT, "kv_only_blocks": 6, "kv_only_tail": 64}
    },
    "8 of 24 blocks K and V alone in prefill, tail of 64 tokens": {
        "healing": {**REFIT, "kv_only_blocks": 8, "kv_only_tail": 64}
    },
    "2 of 24 blocks fewer in decode": {"pruning": {"method": "greedy", "decode_blocks": 2}, "healing": REFIT},
}
"""Sections of the recipes of plans that cut blocks; all prompt KV travels native."""
QUESTIONS = ("humaneval", "gsm8k", "instructions")
PLACE, ROOT = HERE.parent / "out" / "bench-generated", HERE.parent
REQUESTS, POOL_TOKENS = 16, 24_576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=[*PLANS, *BLOCKS], choices=[*PLANS, *BLOCKS], metavar="PLAN")
    parser.add_argument("--tasks", nargs="+", default=[*QUESTIONS], choices=QUESTIONS, metavar="TASK")
    parser.add_argument("--items", type=int, default=200, help="questions of each task, the first")
    parser.add_argument("--max-tokens", type=int, default=384, help="of an answer")
    parser.add_argument("--again", action="store_true", help="though another commit's answers are there")
    options = parser.parse_args()
    note = timed_notes()
    PLACE.mkdir(parents=True, exist_ok=True)
    log, now = RowLog(PLACE / "rows.jsonl", [options.items, options.max_tokens]), commit()
    older = committed(HERE / "results" / "generated.json", options, ("items", "max_tokens"))
    by_name = {(row["plan"], row["task"]): row for row in older}

    def known(plan: str, task: str) -> dict[str, Any] | None:
        here = log.find(plan=plan, task=task, commit=now)
        return here if here or options.again else by_name.get((plan, task)) or log.find(plan=plan, task=task)

    for plan in options.plans:
        missing = [task for task in options.tasks if known(plan, task) is None]
        if missing:
            bundle = _built(plan)
            reduction = bfloat16_reduction(bundle.plan, ASKED_AT)
            about = {"reduction": reduction, "digest": bundle.plan.digest, "commit": now}
            serving = WorkerOptions(max_total_tokens=POOL_TOKENS, max_running_requests=REQUESTS)
            with cluster_of(bundle, options=serving, say=note) as cluster:
                for task in missing:
                    row = _judged(cluster.url, plan, task, options, note)
                    log.append({"plan": plan, "task": task, **about, "machine": machine()["cpu"]} | row)
    options.plans, options.tasks, options.again = [*PLANS, *BLOCKS], [*QUESTIONS], False
    rows = [known(plan, task) for plan in (*PLANS, *BLOCKS) for task in QUESTIONS]
    print(write("generated", options, [row for row in rows if row is not None]))


def _judged(url: str, plan: str, name: str, options: argparse.Namespace, note: Any) -> dict[str, Any]:
    """Which answers are right, their tokens, and how many were cut, with the questions' source."""
    task = TASKS[name]
    data = task.load(Setting(Cache.default(), note))
    questions = data.questions[: options.items]
    answers = ask(url, task, questions, options.max_tokens, REQUESTS, lambda line: note(f"{name}: {line}"))
    texts = PLACE / "answers" / plan / f"{name}.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("".join(json.dumps([q.id, a.text]) + "\n" for q, a in zip(questions, answers, strict=True)))
    return {
        "source": data.source,
        "licence": data.licence,
        "right": [int(answer.right) for answer in answers],
        "tokens": [answer.tokens for answer in answers],
        "cut": sum(answer.reason == "length" for answer in answers),
    }


def _built(plan: str) -> Bundle:
    file, units = PLACE / "recipe.yaml", ROOT / "recipes" / "units"
    parts = [str(units / "model" / "qwen2.5-coder-0.5b.yaml"), str(units / "calibration" / "mixed.yaml")]
    sections = BLOCKS.get(plan) or {"kv": PLANS[plan]}
    file.write_text(json.dumps({"include": parts, "name": "generated"} | sections))
    recipe = Recipe.load(file)
    folder: Path = PLACE / plan.replace(",", "").replace(" ", "-")
    return built(recipe, folder)


if __name__ == "__main__":
    main()
