"""sgl-eval 0.1.3 as driver: SGLang's harness asks an OpenAI endpoint, and grades GSM8K.

It runs in `.venv/evals`, for its pins clash with ours. It gets questions as its own JSON lines and leaves a line for
each answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.evaluation.evals_environment import python
from pdtrim_deploy.evaluation.generated.base import Answer, GeneratedTask, Question
from pdtrim_deploy.local.child import Child
from pdtrim_deploy.local.job import last_line


def ask(
    url: str,
    task: GeneratedTask,
    questions: Sequence[Question],
    max_tokens: int,
    concurrency: int,
    note: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Greedy chat answers of the model at `url`, in the order of the questions.

    Raises:
        ServingError: sgl-eval broke, or a question has no answer: that is no wrong answer.

    """
    with tempfile.TemporaryDirectory(prefix="pdtrim-sgl-eval-") as scratch:
        folder = Path(scratch)
        with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
            for question in questions:
                row = {"id": question.id, "problem": question.problem, "expected_answer": question.expected}
                file.write(json.dumps(row) + "\n")
        if task.prompt is not None:
            (folder / "prompt.yaml").write_text(yaml.safe_dump({"user": task.prompt}))
        words = command(url, task, max_tokens, concurrency, folder)
        _run(words, folder, lambda: note(f"{len(_lines(folder))}/{len(questions)} answers"))
        rows = {row["id"]: row for row in map(json.loads, _lines(folder))}
        log = (folder / "log").read_text(errors="replace").strip().splitlines() or ["no output"]
    lost = [q.id for q in questions if q.id not in rows or rows[q.id]["finish_reason"] not in ("stop", "length")]
    if lost:
        raise ServingError(
            f"{url}: {len(lost)} of {len(questions)} questions of {task.name} got no answer, {lost[0]} the first "
            f"({log[-1].strip()}); look into the logs of its workers"
        )
    return [_answer(task, question, rows[question.id]) for question in questions]


def command(url: str, task: GeneratedTask, max_tokens: int, concurrency: int, folder: Path) -> list[str]:
    """The program and its options; its own default of 0.95 for top-p means nothing at temperature 0."""
    options: dict[str, object] = {
        "--base-url": f"{url.rstrip('/')}/v1",
        "--from-dataset": folder / "questions.jsonl",
        "--max-tokens": max_tokens,
        "--temperature": 0,
        "--num-threads": concurrency,
        "--n-repeats": 1,
        "--out-dir": folder / "out",
    }
    if task.prompt is not None:
        options["--prompt"] = folder / "prompt.yaml"
    program = str(python().with_name("sgl-eval"))
    return [program, "run", "gsm8k", *(str(part) for pair in options.items() for part in pair)]


def _run(words: list[str], folder: Path, tell: Callable[[], None]) -> None:
    environment = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    with (folder / "log").open("w") as log:
        child = Child(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=folder
        )
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5.0)
                tell()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        last = last_line((folder / "log").read_text(errors="replace"))
        raise ServingError(f"sgl-eval ended with exit code {child.returncode}: {last}")


def _lines(folder: Path) -> list[str]:
    """JSON lines so far: ended by line feeds alone, since texts hold other line separators of Unicode unescaped."""
    files = [file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("out/*/output-rs0.jsonl")]
    return [line for text in files for line in text.split("\n") if line.strip()]


def _answer(task: GeneratedTask, question: Question, row: dict[str, Any]) -> Answer:
    text = row["generation"]
    right = bool(row["symbolic_correct"]) if task.right is None else task.right(question, text)
    return Answer(text, row["finish_reason"], row["num_generated_tokens"], right)
