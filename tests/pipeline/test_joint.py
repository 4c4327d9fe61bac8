"""Builds of a tiny model for a target: the plan keeps it, steps resume, and older recipes are not changed by it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tinypd import make_plan

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.pipeline.recipe_fit import check_fits, check_shared
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import Recipe

KV = {
    "method": "budget", "sparse_choices": [[2, 4], [2, 8]], "wire_choices": ["native", "int8"], "sequences": 3,
    "prompt_tokens": 24, "continuation_tokens": 8,
}  # fmt: skip


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_llama_dir: Path, text: Path) -> Callable[..., Recipe]:
    def make(**sections: object) -> Recipe:
        data = {
            "name": "tiny",
            "model": {"source": f"hf:{tiny_llama_dir}"},
            "calibration": {"corpus": f"dir:{text}", "sequences": 4, "length": 32},
            "kv": KV,
            "evaluation": {"corpus": f"dir:{text}", "sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(data | sections))
        return Recipe.load(path)

    return make


def test_a_build_for_a_target_reaches_it(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    recipe = recipe_of(target={"itl": 0.85, "ttft": 0.85, "kv": 3.0, "rounds": 1})
    shown = preview(recipe, tmp_path / "b", cache)
    assert "target" in shown.steps
    assert "prune" not in shown.steps
    assert shown.costs is not None
    assert shown.costs["target"].flops
    notes: list[str] = []
    bundle = build(recipe, tmp_path / "b", cache, notes.append)
    report = json.loads((bundle.reports_dir / "target.json").read_text())
    plan = bundle.plan
    assert report["sentence"] == ""
    assert report["reached"]["itl"] <= 0.85
    assert report["reached"]["ttft"] <= 0.85
    assert plan.reduction(24) == pytest.approx(report["reached"]["kv"])
    assert plan.reduction(24) >= 3.0
    choices = report["choices"]
    assert [action.kind == "keep" for action in plan.prefill] == [before == "keep" for before, _ in choices]
    assert [action.kind for action in plan.decode] == [after for _, after in choices]
    healed = json.loads((bundle.reports_dir / "healing.json").read_text())
    alone = [block for block, action in enumerate(plan.prefill) if action.kind == "kv_only"]
    assert healed["kv_only_blocks"] == alone
    card = (bundle.decode_dir / "README.md").read_text()
    assert "chosen together for itl 0.85, ttft 0.85, kv 3" in card
    assert bundle.verify() == []
    again: list[str] = []
    build(recipe, tmp_path / "b", cache, again.append)
    assert again == []


def test_text_that_k_and_v_alone_are_fitted_on_is_no_longer_than_the_model_takes(
    recipe_of: Callable[..., Recipe],
) -> None:
    recipe = recipe_of(target={"ttft": 0.85}, calibration={"corpus": "brown", "length": 1025})
    with pytest.raises(UserError, match=r"calibration\.length is 1025 tokens; allowed: at most 1024"):
        check_fits(recipe, 6, 1024)


def test_a_prefill_that_runs_blocks_for_their_kv_alone_is_built_and_refitted(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    """A target of prefill's time alone: decode keeps all blocks, so those that prefill skips are there for their KV."""
    kv = {"method": "none", "sequences": 3, "prompt_tokens": 24, "continuation_tokens": 8}
    healing = {"compensation": "least-squares", "sequences": 8, "length": 32}
    bundle = build(recipe_of(target={"ttft": 0.3, "rounds": 0}, kv=kv, healing=healing), tmp_path / "b", cache)
    plan = bundle.plan
    assert {action.kind for action in plan.decode} == {"keep"}
    assert set(plan.kv) == {plan.kv[0]}
    alone = [block for block, action in enumerate(plan.prefill) if action.kind == "kv_only"]
    assert alone
    assert json.loads((bundle.reports_dir / "healing.json").read_text())["kv_only_blocks"] == alone


def test_before_it_is_built_kv_is_as_small_as_the_target_has_it(recipe_of: Callable[..., Recipe]) -> None:
    shape = PDPlan.dense(make_plan().model).model
    assert stand_in(recipe_of(target={"kv": 3.0}), shape).reduction(24) >= 3.0
    assert stand_in(recipe_of(target={"itl": 0.8}), shape).reduction(24) == 1.0
    least = stand_in(recipe_of(target={"kv": 500.0}), shape)
    assert {(send.n_first + send.n_last, send.wire_dtype) for send in least.kv} == {(6, "int8")}


@pytest.mark.parametrize(
    ("kv", "option"),
    [({"method": "none"}, "kv"), ({"method": "none", "wire_dtype": "int8"}, "kv")],
    ids=["whole", "with key offsets"],
)
def test_text_of_the_target_and_of_the_fit_is_drawn_before_the_first_step(
    recipe_of: Callable[..., Recipe],
    tmp_path: Path,
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
    kv: dict,
    option: str,
) -> None:
    """Whatever a step draws was drawn by the check; and what the check draws, some step reads."""
    kv |= {"sequences": 3, "prompt_tokens": 24, "continuation_tokens": 8}
    drawn: list[tuple[int, int, int | None]] = []
    real = Context.drawn

    def look(self: Context, sequences: int, length: int, prompt: int | None = None) -> tuple[object, int]:
        drawn.append((sequences, length, length // 2 if prompt is None else prompt))
        return real(self, sequences, length, prompt)

    monkeypatch.setattr(Context, "drawn", look)
    recipe = recipe_of(target={"itl": 0.85, "rounds": 0}, kv=kv)

    def stop(*_: object) -> None:
        raise UserError("the first step begins")

    with monkeypatch.context() as patched:
        patched.setattr("pdtrim_deploy.pipeline.joint.choose", stop)
        with pytest.raises(UserError, match="the first step begins"):
            build(recipe, tmp_path / "stopped", cache)
    checked = {*drawn}
    drawn.clear()
    monkeypatch.setattr(sys.modules[build.__module__], "check_texts", lambda *_: None)
    build(recipe, tmp_path / "b", cache)
    assert {*drawn} == checked
    short = recipe_of(target={"itl": 0.85}, kv=kv | {"sequences": 10**6})
    with pytest.raises(UserError, match=f"recipe tiny: {option}: "):
        preview(short, tmp_path / "c", cache)


def test_ray_is_refused(recipe_of: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="target is answered by one process alone; build without --workers"):
        check_shared(recipe_of(target={"itl": 0.9}))
