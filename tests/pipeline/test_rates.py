"""Time by step: operations at a rate, the same in a dry run and in the doctor, and what cannot be known here."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from commandline import run
from pretended_devices import PretendedDevices

from pdtrim_deploy.local import compute
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.footprint import Peak
from pdtrim_deploy.models.shape import config_of
from pdtrim_deploy.pipeline import rates
from pdtrim_deploy.pipeline.rates import Rates, measure
from pdtrim_deploy.pipeline.step_cost import WRITTEN, StepCost
from pdtrim_deploy.pipeline.training_costs import TrainingCost
from pdtrim_deploy.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NOTHING = Peak(0.0, 0.0)
RATE = 2e12


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What products were asked for; each has the rate RATE."""
    products = list[tuple[object, ...]]()
    monkeypatch.setattr(rates, "_product_rate", lambda *product: (products.append(product), RATE)[1])
    monkeypatch.setattr(rates, "_hash_rate", lambda: 1e9)
    return products


def test_a_step_s_seconds_are_its_operations_at_the_rate_and_its_files() -> None:
    here = Rates(1e9, 2e9, "1.0 GFLOP/s")
    training = TrainingCost(flops=6e9, memory=0, left=0, files=0)
    steps = {
        "prune": StepCost(NOTHING, flops=7200e9),
        "heal": StepCost(NOTHING, flops=4e9, trainings=(training, training)),
        "prefill": StepCost(NOTHING, written=10 * WRITTEN),
        "seal": StepCost(NOTHING, hashed=8e9),
        "engines/onnx/prefill": StepCost(NOTHING),
        "engines/onnx/decode": StepCost(NOTHING),
    }
    assert [here.seconds(cost) for cost in steps.values()] == [7200, 4 + 2 * 6, 10, 4, None, None]
    assert [here.time(steps[name]) for name in ("prune", "seal", "engines/onnx/prefill")] == [
        "about 2.0 h", "about 4 s", "time not known"
    ]  # fmt: skip
    assert here.sentence(steps) == "about 2.0 h in all without engines, an estimate: operations at 1.0 GFLOP/s"
    limited = StepCost(NOTHING, flops=0.0, trainings=(training,), minutes=0.05)
    assert here.seconds(limited) == pytest.approx(3)
    without_gpu = Rates(None, 2e9, "torch sees no GPU here, not GPU 0")
    assert [without_gpu.seconds(cost) for cost in steps.values()] == [None, None, 10, 4, None, None]
    assert without_gpu.sentence(steps) == "time of operations is not known here: torch sees no GPU here, not GPU 0"


@pytest.mark.parametrize("name", ["smollm2-demo", "qwen2.5-coder-0.5b-quick", "llama-3.1-8b-healed"])
def test_the_doctor_and_a_dry_run_say_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[tuple[object, ...]]
) -> None:
    """Of models that are not here too, from the config that is shipped."""
    recipe, common = RECIPES / f"{name}.yaml", ("--out", tmp_path / "b", "--cache-dir", tmp_path / "c")
    doctor = run(capsys, "doctor", recipe, "--for", "build", *common)[1]
    code, dry, _ = run(capsys, "build", recipe, "--dry-run", *common)
    assert code == 0
    by_doctor = dict(re.findall(r"step (\S+) +(about [\d.]+ \w+|time not known), ", doctor))
    assert dict(re.findall(r"^  (\S+) +to do  (about [\d.]+ \w+|time not known), ", dry, re.MULTILINE)) == by_doctor
    sentence = re.search(r"about .* in all.*, an estimate: operations at 2.0 TFLOP/s, the rate of plain .*", dry)
    assert sentence
    assert f"time to build          {sentence[0]}\n" in doctor
    json_seconds = json.loads(run(capsys, "build", recipe, "--dry-run", "--json", *common)[1])["seconds"]
    assert list(json_seconds) == list(by_doctor)
    tera = float(re.search(r"step prune .* ([\d,.]+) TFLOP", doctor)[1].replace(",", ""))  # type: ignore[index]
    assert json_seconds["prune"] * RATE / 1e12 == pytest.approx(tera, abs=0.05)


def test_the_rate_is_that_of_the_dtype_that_the_recipe_measures_in(measured: list[tuple[object, ...]]) -> None:
    recipe = Recipe.load(RECIPES / "llama-3.1-8b-pruned.yaml")
    halved = recipe.changed("test", "model", compute_dtype="bfloat16")
    path = config_of(recipe.model.source)
    assert path is not None
    config = json.loads(path.read_text())
    assert "plain bfloat16 matrix products on cpu" in measure(halved, config, Compute()).basis
    measure(recipe, config, Compute())
    length = recipe.calibration.length
    assert measured == [(length, 4096, 14336, "cpu", dtype) for dtype in ("bfloat16", "float32")]


def test_where_the_gpu_is_not_here_no_time_of_operations_is_estimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_cuda_devices", lambda: 1)
    recipe, common = RECIPES / "llama-3.1-8b-pruned.yaml", ("--out", tmp_path / "b", "--device", "cuda:1")
    code, dry, _ = run(capsys, "build", recipe, "--dry-run", *common)
    assert code == 0
    lack = "torch sees GPU 0 alone here, not GPU 1; run this on the machine with that GPU"
    assert f"time of operations is not known here: {lack}\n" in dry
    assert re.search(r"seal +to do  about ", dry)
    assert re.search(r"prune +to do  time not known, .* GB on devices", dry)
    assert "a time that is not known here" in dry
    code, doctor, _ = run(capsys, "doctor", recipe, "--for", "build", *common)
    assert code == 1
    assert re.search(r"missing +--device +torch sees GPU 0 alone here, not GPU 1\n.*give --device auto or cpu", doctor)
    assert "time of operations is not known here" in doctor
    assert run(capsys, "build", recipe, *common)[0] == 2
    assert not (tmp_path / "b").exists()


def test_a_device_that_computes_nothing_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*product: object) -> float:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee")

    monkeypatch.setattr(rates, "_product_rate", full)
    recipe = Recipe.load(RECIPES / "llama-3.1-8b-pruned.yaml")
    path = config_of(recipe.model.source)
    assert path is not None
    measured = measure(recipe, json.loads(path.read_text()), Compute())
    assert (measured.products, measured.basis) == (None, "cpu computes nothing now (CUDA out of memory)")


def test_on_a_gpu_products_are_of_tensors_that_lie_there() -> None:
    with PretendedDevices():
        assert rates._product_rate(8, 64, 128, "cuda:1", "bfloat16") > 0


def test_the_rate_of_this_machine() -> None:
    """Of a part of a huge product: whole, it would take more memory than there is."""
    assert 1e7 < rates._product_rate(10**9, 10**9, 10**9) < 1e15


def test_a_slow_product_is_cut_to_rows_that_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows take 0.15 s by this clock, so 0.2 s is that of 42."""
    calls = itertools.count()
    monkeypatch.setattr(rates.time, "perf_counter", lambda: 0.15 * next(calls))
    assert rates._product_rate(100, 8, 16) == pytest.approx(2 * 42 * 8 * 16 / 0.3)
