"""Runs lm-evaluation-harness 0.4.13 in its own environment, with the process that started it as the model.

A program, not a module of ours: it imports nothing of this project. It speaks lines of JSON. The first line of stdin is
the job, `{"tasks", "include_path", "limit", "names_only"}`; of names alone it writes `{"known": true}`. Else it writes
`{"call": KIND, "requests": [...]}` for what the model must do and reads `{"results": [...]}`, and last it writes
`{"samples": {NAME: {TASK: [...]}}, "higher_is_better": {TASK: {METRIC: true or false}}}`, a group's tasks under its
name. In place of either comes `{"error": SENTENCE}`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager


class Remote(LM):
    """A model that answers through a pipe."""

    def __init__(self, channel: TextIO) -> None:
        super().__init__()
        self._channel = channel

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether it is the greedy text) of each (context, continuation)."""
        return [tuple(pair) for pair in self._call("loglikelihood", [list(request.args) for request in requests])]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Sum of log-probabilities of each text."""
        return self._call("loglikelihood_rolling", [request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text behind each context."""
        return self._call("generate_until", [self._limits(*request.args) for request in requests])

    def _limits(self, context: str, options: dict[str, Any]) -> tuple[str, list[str], int]:
        options = normalize_gen_kwargs(options)
        if options["do_sample"] and options.get("temperature", 0.0) > 0:
            raise ValueError("the task samples its texts, and only greedy ones are generated; set do_sample: false")
        return context, options["until"], options["max_gen_toks"]

    def _call(self, kind: str, requests: list[Any]) -> Any:
        send(self._channel, {"call": kind, "requests": requests})
        return json.loads(sys.stdin.readline())["results"]


def send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message, default=str) + "\n")
    channel.flush()


def manager(names: list[str], include_path: str | None) -> TaskManager:
    """Local tasks alone where they are all that is asked for: the harness's own are 10,000 files.

    Raises:
        ValueError: a task exists in neither.

    """
    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(local.all_tasks):
            return local
    tasks = TaskManager(include_path=include_path)
    for name in names:
        if name not in tasks.all_tasks:
            raise ValueError(f"lm-eval has no task {name!r}; see its list, or name a folder of YAML by --include-path")
    return tasks


def samples(job: dict[str, Any], channel: TextIO) -> dict[str, Any]:
    """Samples as the harness logs them, of each name that was given, by task; and each metric's direction."""
    model, tasks = Remote(channel), manager(job["tasks"], job["include_path"])
    common = {"limit": job["limit"], "bootstrap_iters": 0, "log_samples": True, "verbosity": "ERROR"}
    results = {name: simple_evaluate(model=model, tasks=[name], task_manager=tasks, **common) for name in job["tasks"]}
    directions = {task: higher for result in results.values() for task, higher in result["higher_is_better"].items()}
    return {"samples": {name: result["samples"] for name, result in results.items()}, "higher_is_better": directions}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything prints must not get among the messages
    job = json.loads(sys.stdin.readline())
    try:
        if job["names_only"]:
            manager(job["tasks"], job["include_path"])
            send(channel, {"known": True})
        else:
            send(channel, samples(job, channel))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        send(channel, {"error": f"{reason[:400]}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
