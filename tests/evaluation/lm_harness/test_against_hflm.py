"""lm-evaluation-harness on the oracle, beside its own adapter for transformers, on a model that nothing is cut from."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from localtasks import TASKS, write_tasks

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.lm_harness.samples import measured
from pdtrim_deploy.local.own_environment import REPO
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

INSTALLED = (REPO / ".venv" / "evals" / "pdtrim-stamp.json").is_file()
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs .venv/evals: make setup-evals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A context of 256 tokens: the longest texts take several windows."""
    return tiny_model(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM", max_position_embeddings=256)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets"))}


@pytest.fixture(scope="module")
def hflm(small: Path, folder: Path, offline: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Its `samples` and `results`, by task."""
    program = [REPO / ".venv/evals/bin/python", Path(__file__).with_name("hflm.py"), sysconfig.get_path("purelib")]
    words, environment = [*program, small, folder, *TASKS], os.environ | offline
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def reference(hflm: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return hflm["samples"]


def test_perplexity_a_word_is_the_harness_s_own(hflm: dict[str, dict[str, Any]]) -> None:
    result = measured("tiny_rolling", hflm["samples"]["tiny_rolling"])
    expected = hflm["results"]["tiny_rolling"]["word_perplexity,none"]
    assert len(set(result.weights["nll_word"])) == len(result.groups)  # texts of other lengths each
    assert math.exp(result.mean("nll_word")) == pytest.approx(expected, rel=1e-9)


def oracle_of(folder: Path, send: KVSend) -> PDOracle:
    model = load_model(folder)
    shape = ModelShape(
        architecture="Qwen2ForCausalLM", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=16, kv_dtype="float32"
    )
    return PDOracle(model, model, PDPlan.dense(shape).with_kv((send,) * 6))


def answers(
    small: Path, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, offline: dict[str, str], **more: Any
) -> dict[str, list[Any]]:
    """Each task's answers as the harness logged them, in the order of the questions."""
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    send = more.pop("send", KVSend())
    Harness(TASKS, folder, **more).measure(oracle_of(small, send), load_tokenizer(small), out)
    return {task: read(out / f"{task}.jsonl") for task in TASKS}


def read(file: Path) -> list[Any]:
    return responses([json.loads(line) for line in file.read_text().splitlines()])


def responses(samples: list[dict[str, Any]]) -> list[Any]:
    return [answer for sample in sorted(samples, key=lambda s: s["doc_id"]) for answer in sample["resps"]]


@pytest.mark.parametrize("hand_over", ["served", "decode"])
def test_behind_a_plan_that_cuts_nothing_answers_are_those_of_the_harness(
    hand_over: str,
    small: Path,
    folder: Path,
    reference: dict[str, Any],
    offline: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = answers(small, folder, tmp_path, monkeypatch, offline, hand_over=hand_over)
    harness = {task: responses(reference[task]) for task in TASKS}
    for (answer,), (expected,) in zip(ours["tiny_choice"], harness["tiny_choice"], strict=True):
        assert float(answer[0]) == pytest.approx(float(expected[0]), abs=2e-4)
        assert str(answer[1]) == str(expected[1])
    for (answer,), (expected,) in zip(ours["tiny_rolling"], harness["tiny_rolling"], strict=True):
        assert float(answer) == pytest.approx(float(expected), abs=2e-3)
    assert ours["tiny_text"] == harness["tiny_text"]
    assert len({text for (text,) in ours["tiny_text"]}) > 3


def test_a_plan_that_cuts_changes_answers_in_both_hand_overs(
    small: Path,
    folder: Path,
    reference: dict[str, Any],
    offline: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = KVSend(mode="sparse", n_first=1, n_last=1)
    common = (small, folder, tmp_path, monkeypatch, offline)
    served, decode = (answers(*common, send=send, hand_over=hand_over, limit=3) for hand_over in ("served", "decode"))
    assert all(served[task] != decode[task] for task in TASKS)
    whole = responses(reference["tiny_choice"])
    for cut in (served, decode):
        differences = [abs(float(a[0]) - float(b[0])) for (a,), (b,) in zip(cut["tiny_choice"], whole, strict=False)]
        assert max(differences) > 1e-2  # 2e-4 is the most that rounding does
    assert len(decode["tiny_choice"]) == 3 * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "other"}, "lm-eval: lm-eval has no task 'tiny_text'; see its list, or name a folder of YAML"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, "only greedy ones are generated"),
        ({"generation_kwargs": {"max_gen_toks": 999}}, "generates up to 999 tokens, and the model's context has 256"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "lm-eval: Unable to find"),
    ],
    ids=["unknown", "sampled", "long", "no data"],
)
def test_a_task_that_cannot_run_says_why(
    change: dict[str, Any],
    says: str,
    small: Path,
    folder: Path,
    offline: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = yaml.safe_load((folder / "tiny_text.yaml").read_text())
    (tmp_path / "tiny_text.yaml").write_text(yaml.safe_dump(task | change))
    (tmp_path / "rows.jsonl").write_text((folder / "rows.jsonl").read_text())
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    oracle, tokenizer = oracle_of(small, KVSend()), load_tokenizer(small)
    with pytest.raises(UserError, match=re.escape(says)):
        Harness(("tiny_text",), tmp_path).measure(oracle, tokenizer, tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_a_group_stands_under_its_own_name(
    small: Path, folder: Path, offline: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path)
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "tiny", "task": ["tiny_choice", "second"]}))
    second = yaml.safe_load((tmp_path / "tiny_choice.yaml").read_text()) | {"task": "second"}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    oracle, tokenizer = oracle_of(small, KVSend()), load_tokenizer(small)
    (result,) = Harness(("tiny",), tmp_path, limit=2).measure(oracle, tokenizer, tmp_path / "samples")
    assert (result.task, sorted(result.groups)) == ("lm_eval:tiny", ["second"] * 2 + ["tiny_choice"] * 2)
    assert {file.stem for file in (tmp_path / "samples").iterdir()} == {"tiny_choice", "second"}
