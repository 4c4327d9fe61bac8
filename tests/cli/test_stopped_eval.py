"""What Ctrl-C during `eval` leaves, and that its sentence is true."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from answering import answering
from bare_bundle import make_bundle

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli import main
from pdtrim_deploy.evaluation.generated import TASKS
from pdtrim_deploy.evaluation.generated.base import Answer, Question, QuestionSet
from pdtrim_deploy.evaluation.generated.served import Pair


def test_ctrl_c_between_two_tasks_keeps_the_answers_of_the_first_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "bundle")
    reports = Bundle.open(tmp_path / "bundle").reports_dir
    tasks: list[str] = []

    def answers(pair: Pair, url: str, task: Any, questions: Any, *_: object) -> list[Answer]:
        tasks.append(task.name)
        if len(tasks) == 2:
            raise KeyboardInterrupt
        return [Answer("yes", "stop", 1, True) for _ in questions]

    monkeypatch.setattr(Pair, "_answers", answers)
    arguments = ["--tasks", "instructions,turns", "--bundle", str(tmp_path / "bundle"), "--lengths", "1024"]
    arguments += ["--cache-dir", str(tmp_path / "cache")]
    with answering(lambda _: "yes") as url, pytest.raises(SystemExit) as ended:
        main(["eval", url, *arguments])
    assert (ended.value.code, tasks) == (130, ["instructions", "turns"])
    assert [file.name for file in (reports / "served").iterdir()] == ["instructions.jsonl"]
    assert not (reports / "served.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pdtrim-deploy: stopped by Ctrl-C; the report is written at the end, answers of finished")
    assert "nothing was written" not in last


def test_answers_of_an_earlier_run_stay_whole_where_they_cannot_be_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(_: int) -> None:
        raise KeyboardInterrupt

    (file := tmp_path / "turns.jsonl").write_text("before")
    monkeypatch.setattr(Pair, "_answers", lambda *_: [Answer("yes", "stop", 1, True)])
    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        Pair("http://127.0.0.1:1", None, 1).judge(
            TASKS["turns"], QuestionSet("t", "none", "", (Question("t-1", "Read.", "x"),)), {}, file
        )
    assert [left.read_text() for left in tmp_path.iterdir()] == ["before"]
