"""A run of lm-evaluation-harness beside us: it asks, the oracle answers, and its samples come back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.evals_environment import python
from pdtrim_deploy.evaluation.lm_harness.answers import Answers
from pdtrim_deploy.evaluation.lm_harness.samples import joined, measured
from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.local.child import Child
from pdtrim_deploy.local.job import last_line
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.recipe.gates import LM_EVAL

_DRIVER = Path(__file__).with_name("driver.py")


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval by its own names.

    Attributes:
        include_path: a folder of task YAML; data files that these name are relative to it.
        limit: questions of each task, the first; None: all.
        hand_over: as of `Answers`.

    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    hand_over: HandOver | None = None

    def measure(
        self, oracle: PDOracle, tokenizer: Any, samples: Path, note: Callable[[str], None] = lambda _: None
    ) -> list[Measured]:
        """A result for each name, a group's over all questions of its tasks; answers go to `samples`/TASK.jsonl.

        Raises:
            UserError: the harness has no such task or cannot read its data, the task cannot be answered, or it broke.

        """
        answers = Answers(oracle, tokenizer, self.hand_over, note)
        message = self._run(answers, names_only=False)
        return self._written(message["samples"], message["higher_is_better"], samples)

    def check(self) -> None:
        """UserError where the harness has no such task; takes the harness's start, and no model or data."""
        self._run(None, names_only=True)

    def _run(self, answers: Answers | None, names_only: bool) -> dict[str, Any]:
        """The driver's last message; UserError where that is an error, or there is none."""
        with self._running() as (child, log):
            assert child.stdin is not None
            assert child.stdout is not None
            include_path = None if self.include_path is None else str(self.include_path.resolve())
            job = {"tasks": self.tasks, "limit": self.limit, "include_path": include_path, "names_only": names_only}
            self._send(child.stdin, job)
            for line in child.stdout:
                message: dict[str, Any] = json.loads(line)
                if "call" in message:
                    results = getattr(answers, message["call"])(message["requests"])
                    self._send(child.stdin, {"results": results})
                elif "error" in message:
                    raise UserError(f"lm-eval: {message['error']}")
                else:
                    return message
            child.wait()
            log.seek(0)
            last = last_line(log.read())
            raise UserError(f"lm-eval ended with exit code {child.returncode} ({last}); run: make setup-evals")

    @contextlib.contextmanager
    def _running(self) -> Iterator[tuple[Child[str], IO[str]]]:
        with tempfile.TemporaryFile("w+") as log:
            child = Child(
                [python(), _DRIVER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                cwd=self.include_path, env={name: v for name, v in os.environ.items() if name != "PYTHONPATH"},
            )  # fmt: skip
            try:
                yield child, log
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.communicate()

    @staticmethod
    def _send(pipe: IO[str], message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it says of that is read next
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

    @staticmethod
    def _written(
        by_name: dict[str, dict[str, list[dict[str, Any]]]], higher: dict[str, dict[str, bool | None]], folder: Path
    ) -> list[Measured]:
        results = []
        for name, by_task in by_name.items():
            of_tasks = {task: measured(task, samples, higher.get(task)) for task, samples in by_task.items()}
            results.append(joined(LM_EVAL + name, of_tasks))
        for task, samples in (item for by_task in by_name.values() for item in by_task.items()):
            lines = "".join(json.dumps(sample) + "\n" for sample in samples)
            write_atomic(folder / f"{task.replace('/', '-')}.jsonl", lines)
        return results
