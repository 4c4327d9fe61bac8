"""The annealed search as a step of a build: stopped and resumed, made anew by force, refused where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from commandline import run
from tinyfamilies import taking
from tinytext import write_words
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning import finalists
from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.ray_evaluator import Workers
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.search import Problem
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.recipe import Recipe


def recipe(folder: Path, model: Path, **pruning: object) -> Recipe:
    texts = write_words(folder / "text", files=6, words=200)
    data = {
        "name": "searched",
        "model": {"source": f"hf:{model}"},
        "calibration": {"corpus": f"dir:{texts}", "sequences": 4, "length": 40},
        "pruning": {"method": "anneal", "prefill_blocks": 1, "decode_blocks": 3, "steps": 12} | pruning,
        "healing": {"sequences": 8, "length": 40},
        "evaluation": {"corpus": f"dir:{texts}", "sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(data))
    return Recipe.load(folder / "r.yaml")


def rows(out: Path, stage: str) -> list[dict]:
    lines = (out / "reports" / f"search-{stage}.jsonl").read_text().splitlines()[1:]
    steps = [row for row in map(json.loads, lines) if "race" not in row]
    return [{key: value for key, value in row.items() if key not in ("seconds", "block_forwards")} for row in steps]


def test_a_stopped_search_goes_on_and_force_begins_anew(tmp_path: Path, tiny_llama_dir: Path, cache: Cache) -> None:
    config, out = recipe(tmp_path, tiny_llama_dir), tmp_path / "b"

    def stop(line: str) -> None:
        if "decode: anneal 5/12" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, out, cache, stop)
    assert not (out / "COMPLETE").exists()
    kept = rows(out, "prefill"), rows(out, "decode")
    lines: list[str] = []
    bundle = build(config, out, cache, lines.append)
    assert not any("anneal 4/12" in line for line in lines)
    assert rows(out, "prefill") == kept[0]
    assert rows(out, "decode")[: len(kept[1])] == kept[1]
    assert bundle.verify() == []
    again = build(config, tmp_path / "c", cache)
    assert again.plan == bundle.plan
    assert rows(out, "decode") == rows(tmp_path / "c", "decode")
    report = json.loads((out / "reports" / "pruning.json").read_text())
    start, *steps = rows(out, "decode")[1:]  # two removals by greedy, then the chain
    assert report["decode"]["loss"] == min([start["loss"], *(row["loss"] for row in steps if row["accepted"])])
    forced: list[str] = []
    build(config, out, cache, forced.append, force=True)
    assert any("anneal 1/12" in line for line in forced)


def test_finalists_are_in_the_report_and_the_best_of_them_is_built(
    tmp_path: Path, tiny_llama_dir: Path, cache: Cache
) -> None:
    config = recipe(tmp_path, tiny_llama_dir).changed("test", "healing", compensation="norm")
    config = config.changed("test", "pruning", finalists=4)
    bundle = build(config, tmp_path / "b", cache)
    report = json.loads((tmp_path / "b" / "reports" / "pruning.json").read_text())
    assert any("finalists" in section for section in report.values())
    for stage, section in report.items():
        if "finalists" not in section:  # all that was found is one solution
            continue
        assert 2 <= len(section["finalists"]) <= 4
        assert section["finalists"] == sorted(section["finalists"], key=lambda finalist: finalist["compensated"])
        best = min(section["finalists"], key=lambda finalist: finalist.get("decode_behind", finalist["compensated"]))
        assert sorted(section["removed"]) == best["removed"] == list(bundle.plan.dropped(stage))
        assert section["loss"] == best["loss"]


def test_blocks_by_kl_behind_longer_prompts_are_searched_and_judged_so(
    tmp_path: Path, tiny_llama_dir: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    really = DenseKL.losses

    def losses(self: DenseKL, batch: int, hidden: Tensor, sample: None = None) -> Tensor:
        scored.append(hidden.shape[1])
        return really(self, batch, hidden, sample)

    def first(problem: Problem, *_: object) -> Solution:
        return problem.without(problem.candidates[: problem.remove - problem.forced.saved])

    monkeypatch.setattr(DenseKL, "losses", losses)
    monkeypatch.setattr(finalists, "_window", first)
    config = recipe(tmp_path, tiny_llama_dir, method="greedy", steps=150)
    config = config.changed("test", "healing", compensation="norm")
    config = config.changed("test", "pruning", objective="kl", finalists=2)
    config = config.changed("test", "calibration", prompt_tokens=30)
    build(config, tmp_path / "b", cache)
    assert set(scored) == {39, 9}, "prefill's 39 tokens, decode's 9 behind a prompt of 30"
    report = json.loads((tmp_path / "b" / "reports" / "pruning.json").read_text())
    judged = [finalist["compensated"] for section in report.values() for finalist in section.get("finalists", [])]
    assert len(judged) >= 2
    assert max(judged) < 3, "no text's loss is so low here"


def test_a_search_stopped_behind_its_finalists_asks_the_judge_nothing_again(
    tmp_path: Path, tiny_llama_dir: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path, tiny_llama_dir, prefill_blocks=2, decode_blocks=4)
    config = config.changed("test", "healing", compensation="least-squares")
    config, out = config.changed("test", "pruning", finalists=4), tmp_path / "b"
    judged: list[list[Solution]] = []
    really = RefitJudge.__call__

    def judge(self: RefitJudge, stage: Stage, prefill: Solution, solutions: list[Solution]) -> Iterator[float]:
        judged.append(solutions)
        if stage == "decode":
            raise KeyboardInterrupt
        return really(self, stage, prefill, solutions)

    with monkeypatch.context() as patch:
        patch.setattr(RefitJudge, "__call__", judge)
        with pytest.raises(KeyboardInterrupt):
            build(config, out, cache)
    assert len(judged) == 2
    lines: list[str] = []
    bundle = build(config, out, cache, lines.append)
    assert not any("prefill: " in line and "solutions compensated" in line for line in lines)
    whole: list[str] = []
    assert bundle.plan == build(config, tmp_path / "c", Cache(tmp_path / "other"), whole.append).plan
    assert any("prefill: " in line and "solutions compensated" in line for line in whole)
    forced: list[str] = []
    build(config, tmp_path / "c", Cache(tmp_path / "other"), forced.append, force=True)
    assert any("prefill: " in line and "solutions compensated" in line for line in forced)


@pytest.mark.parametrize("begun", [False, True])
def test_decode_searched_again_is_in_the_report_and_leaves_its_trajectory(
    begun: bool, tmp_path: Path, tiny_llama_dir: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge likes any other prefill better; decode behind it or behind the first one."""
    started: list[Solution] = []

    def judge(self: RefitJudge, stage: str, prefill: Solution, solutions: list[Solution]) -> list[float]:
        if stage == "prefill":
            started.append(solutions[0])
            return [-float(at) for at in range(len(solutions))]
        return [float((prefill == started[0]) != begun)] * len(solutions)

    def last(problem: Problem, *_: object) -> Solution:
        return problem.without(problem.candidates[problem.forced.saved - problem.remove :])

    monkeypatch.setattr(RefitJudge, "__call__", judge)
    monkeypatch.setattr(finalists, "_window", last)  # the best one is greedy's here
    config = recipe(tmp_path, tiny_llama_dir, method="greedy", steps=150, prefill_blocks=2, decode_blocks=4)
    config = config.changed("test", "healing", compensation="norm").changed("test", "pruning", finalists=2)
    again, reports = "search-decode-again.jsonl", tmp_path / "b" / "reports"
    bundle = build(config, tmp_path / "b", cache)
    section = json.loads((reports / "pruning.json").read_text())["prefill"]
    decode_losses = {tuple(finalist["removed"]): finalist["decode_behind"] for finalist in section["finalists"]}
    assert sorted(decode_losses.values()) == [0, 1]
    assert decode_losses[tuple(sorted(section["removed"]))] == 0
    assert list(bundle.plan.dropped("prefill")) == sorted(section["removed"])
    assert (tuple(sorted(section["removed"])) == started[0].removed) == begun
    assert (reports / again).exists()
    assert (reports / "judged.jsonl").exists()
    assert bundle.verify() == []
    build(config.changed("test", "pruning", finalists=0), tmp_path / "b", cache, force=True)
    assert not (reports / again).exists()
    assert not (reports / "judged.jsonl").exists()


def test_blocks_from_the_checkpoint_give_the_same_bundle(
    tmp_path: Path, tiny_llama_dir: Path, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    bounded = recipe(tmp_path, tiny_llama_dir, blocks_in_memory=1, memory_mb=1, disk_mb=1)
    bundle = build(bounded, tmp_path / "b", cache, lines.append)
    assert any("1 in memory at a time" in line for line in lines)
    assert bundle.plan == build(recipe(tmp_path, tiny_llama_dir), tmp_path / "c", cache).plan
    assert rows(tmp_path / "b", "decode") == rows(tmp_path / "c", "decode")
    with pytest.raises(UserError, match="each worker holds the whole model"):
        build(bounded, tmp_path / "d", cache, workers=Workers(2))
    with pytest.raises(UserError, match="keeps hidden states in memory alone"):
        build(recipe(tmp_path, tiny_llama_dir, disk_mb=1), tmp_path / "d", cache, workers=Workers(2))
    for method in ("cosine", "streamline"):
        with pytest.raises(UserError, match=f"pruning.method is {method}, which one process searches alone"):
            build(recipe(tmp_path, tiny_llama_dir, method=method, steps=150), tmp_path / "d", cache, workers=Workers(2))
    recipe(tmp_path, tiny_llama_dir, disk_mb=1)
    assert not (tmp_path / "d").exists()
    command = ["build", tmp_path / "r.yaml", "--out", tmp_path / "d", "--dry-run"]
    assert run(capsys, *command)[0] == 0
    code, _, err = run(capsys, *command, "--workers", 2)
    assert code == 2
    assert "leave disk_mb out" in err


@pytest.mark.parametrize(
    ("architecture", "compensation"),
    [
        *((family, "least-squares") for family in taking("least-squares", "distil")),
        ("LlamaForCausalLM", "norm"),
        ("LlamaForCausalLM", "none"),
    ],
)
def test_all_without_gradients_is_the_same_on_blocks_from_the_checkpoint(
    architecture: str,
    compensation: str,
    tmp_path: Path,
    tiny_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Students, finalists and compensation without the whole model, which nothing may load."""
    builds = {}
    for name, more in (("whole", {}), ("bounded", {"blocks_in_memory": 1, "memory_mb": 1, "disk_mb": 1})):
        config = recipe(tmp_path, tiny_dir(architecture), distil=True, threshold=-0.9, **more)
        config = config.changed("test", "students", steps=4).changed("test", "kv", method="all", n_first=2, n_last=4)
        if compensation != "none":
            config = config.changed("test", "healing", compensation=compensation)
            config = config.changed("test", "pruning", finalists=3)
        if more:
            monkeypatch.setattr("pdtrim_deploy.models.loading.load_model", None)
        bundle = build(config, tmp_path / name, Cache(tmp_path / f"{name}-cache"))
        reports = tmp_path / name / "reports"
        lessons = json.loads((reports / "healing.json").read_text())["students"]
        judged = json.loads((reports / "pruning.json").read_text())["decode"].get("finalists")
        assert bool(judged) == (compensation != "none")
        weights = [(tmp_path / name / stage / "model.safetensors").read_bytes() for stage in ("prefill", "decode")]
        builds[name] = (bundle.plan, rows(tmp_path / name, "decode"), lessons, judged, weights)
        assert list((tmp_path / f"{name}-cache").rglob("student.safetensors"))
    assert builds["bounded"] == builds["whole"]


@pytest.mark.parametrize("architecture", taking("distil"))
def test_a_whole_search_writes_checkpoints_that_plain_transformers_loads(
    architecture: str, tmp_path: Path, tiny_dir: Callable[[str], Path], cache: Cache
) -> None:
    transformers = pytest.importorskip("transformers")
    bundle = build(recipe(tmp_path, tiny_dir(architecture), distil=True, threshold=-0.9), tmp_path / "b", cache)
    report = json.loads((tmp_path / "b" / "reports" / "pruning.json").read_text())
    for stage, saved in (("prefill", 1), ("decode", 3)):
        assert len(report[stage]["removed"]) + len(report[stage]["pairs"]) == saved
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b" / stage, output_loading_info=True
        )
        assert len(model.model.layers) == 6 - saved
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert len(bundle.plan.decode_layers) == 3


@pytest.mark.parametrize(
    ("pruning", "says"),
    [
        ({"decode_blocks": 6}, "pruning.decode_blocks is 6; allowed: at most 5, the model has 6 blocks"),
        ({"method": "greedy", "distil": True}, "distil is true but method is greedy"),
        ({"threshold": 1.5}, "pruning.threshold is 1.5"),
        ({"minutes": 0}, "pruning.minutes is 0"),
        (
            {"method": "greedy", "steps": 12},
            "method is greedy, which takes no steps; allowed with it: prefill_blocks, ",
        ),
        ({"method": "greedy", "steps": 150, "minutes": 5}, "method is greedy, which takes no minutes"),
        ({"method": "greedy", "steps": 150, "seed": 1}, "method is greedy, which takes no seed"),
        ({"method": "cosine", "steps": 150, "memory_mb": 2}, "method is cosine, which takes no memory_mb"),
        ({"method": "streamline", "steps": 150, "disk_mb": 2}, "method is streamline, which takes no disk_mb"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    pruning: dict[str, object], says: str, tmp_path: Path, tiny_llama_dir: Path, cache: Cache
) -> None:
    with pytest.raises(UserError, match=says):
        build(recipe(tmp_path, tiny_llama_dir, **pruning), tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


def test_no_calibration_text_leaves_nothing(tmp_path: Path, tiny_llama_dir: Path, cache: Cache) -> None:
    config = recipe(tmp_path, tiny_llama_dir)
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    with pytest.raises(UserError) as stopped:
        build(config, tmp_path / "b", cache)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "b" / "COMPLETE").exists()
    assert not (tmp_path / "b" / "reports").exists()
