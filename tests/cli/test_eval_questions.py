"""A bundle that was calibrated on a task's own questions: `eval` says so, and so do its report and the cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from answering import answering
from bare_bundle import make_bundle
from tinyrecipe import words_recipe
from tinytext import write_words

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli import main
from pdtrim_deploy.evaluation.generated import TASKS
from pdtrim_deploy.evaluation.generated.base import Answer, Question, QuestionSet
from pdtrim_deploy.evaluation.generated.served import Pair
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build

WARNING = ": the bundle's calibration text has some of these questions (corpus questions), so that the score may be"
QUESTIONS = QuestionSet("m", "none", "", tuple(Question(f"m-{n}", "Which?", "A") for n in range(2)))


def calibrated(bundle: Path, *corpora: str, lossy: bool = True) -> Bundle:
    """The same bundle, whose recipe names these corpora and, where `lossy`, blocks chosen on them."""
    file = bundle / "recipe.yaml"
    data = yaml.safe_load(file.read_text())
    data["calibration"] = {"mixture": [{"corpus": name, "share": 1} for name in corpora]}
    data["pruning"] = {"method": "cosine", "decode_blocks": 1} if lossy else {}
    file.write_text(yaml.safe_dump(data))
    return Bundle.open(bundle)


@pytest.mark.parametrize(
    ("corpora", "lossy", "read"),
    [(("brown", "questions"), True, True), (("brown", "code"), True, False), (("brown", "questions"), False, False)],
    ids=["read", "other text", "nothing decided by text"],
)
def test_of_a_served_pair(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    corpora: tuple[str, ...],
    lossy: bool,
    read: bool,
) -> None:
    make_bundle(tmp_path / "bundle")
    bundle = calibrated(tmp_path / "bundle", *corpora, lossy=lossy)
    monkeypatch.setitem(TASKS, "mmlu", replace(TASKS["mmlu"], load=lambda _: QUESTIONS))
    monkeypatch.setattr(Pair, "_answers", lambda *_: [Answer("A", "stop", 1, True)] * 2)
    with answering(lambda _: "A") as url, pytest.raises(SystemExit) as ended:
        main(["eval", url, "--tasks", "mmlu", "--bundle", str(bundle.path), "--cache-dir", str(tmp_path / "cache")])
    assert ended.value.code == 0
    assert [line for line in capsys.readouterr().err.splitlines() if f"warning: mmlu{WARNING}" in line] == [
        f"warning: mmlu{WARNING} too good; to judge by them, build with a calibration.mixture without questions"
    ] * read
    assert json.loads((bundle.reports_dir / "served.json").read_text())["calibrated_on"] == ["mmlu"] * read


def test_of_a_bundle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    recipe, cache = words_recipe(tiny_llama_dir, write_words(tmp_path / "text"), {"method": "none"}), tmp_path / "cache"
    calibrated(build(recipe, tmp_path / "bundle", Cache(cache)).path, "questions")
    result = Measured("lm_eval:mmlu_anatomy", ("all",) * 2, {"acc": (1.0, 0.0)})
    monkeypatch.setattr(Harness, "check", lambda _: None)
    monkeypatch.setattr(Harness, "measure", lambda *_: [result])
    monkeypatch.setattr("pdtrim_deploy.doctor.require", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(tmp_path / "bundle"), "--tasks", "lm_eval:mmlu_anatomy", "--cache-dir", str(cache), "--json"])
    out, err = capsys.readouterr()
    assert (ended.value.code, json.loads(out)["calibrated_on"]) == (0, ["lm_eval:mmlu_anatomy"])
    assert err.count(f"warning: lm_eval:mmlu_anatomy{WARNING}") == 1
    card = (tmp_path / "bundle" / "decode" / "README.md").read_text()
    assert "| lm_eval:mmlu_anatomy, acc (calibrated on some of its questions) | 2 |" in card
