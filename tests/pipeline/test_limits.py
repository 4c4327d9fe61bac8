"""`--memory` and `--device-memory`: which limits they set, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import run

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.limits import fit_judging
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.footprint import PROGRAM, fit_one_model
from pdtrim_deploy.models.shape import config_of
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.engine_costs import EXTERNAL, engine_memory
from pdtrim_deploy.pipeline.limits import fit_build, highest
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.pruning.cost import block_bytes
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import OnnxTarget

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


def recipe_and_config(name: str) -> tuple[Recipe, dict[str, object]]:
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.yaml")
    path = config_of(recipe.model.source)
    assert path is not None
    return recipe, read_config(path)


def test_more_memory_holds_more_blocks_and_no_step_takes_more() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-pruned")
    held = []
    for size in (10, 16, 24, 64):
        limited = fit_build(recipe, config, Compute(host_bytes=size * GB))
        assert highest(step_costs(recipe, config, limited)).host <= size * GB
        held.append(limited.blocks_in_memory or 32)
    assert held == sorted(set(held))
    assert held[-1] == 32
    more = Compute(host_bytes=24 * GB, blocks_in_memory=held[2] + 1)
    assert highest(step_costs(recipe, config, more)).host > 24 * GB  # it held all that it could


@pytest.mark.parametrize(
    ("name", "host", "device"), [("llama-3.1-8b-pruned", 24, 24), ("llama-3.3-70b-balanced", 128, 80)]
)
def test_sizes_of_production_fit_a_host_and_one_gpu(name: str, host: int, device: int) -> None:
    recipe, config = recipe_and_config(name)
    gpu = Compute(("cuda:0",), host_bytes=host * GB, device_bytes=device * GB)
    peak = highest(step_costs(recipe, config, fit_build(recipe, config, gpu)))
    assert 0.5 * device * GB < peak.device <= device * GB
    assert peak.host <= host * GB
    with pytest.raises(UserError, match=r"of device memory \(step .*--device-memory is 4\.0 GB"):
        fit_build(recipe, config, Compute(("cuda:0",), device_bytes=4 * GB))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "host", "device"), [("llama-3.1-8b-healed", 24, 24), ("llama-3.3-70b-balanced", 128, 80)]
)
def test_healing_by_additions_of_low_rank_fits_them_too(name: str, host: int, device: int, dtype: str) -> None:
    """Both stages, and decode behind the KV that arrives; by all weights it is refused, with what to do."""
    recipe, config = recipe_and_config(name)
    pruning = {"method": "greedy", "prefill_blocks": 2, "decode_blocks": 8}
    recipe = recipe.changed("test", "pruning", **pruning).changed("test", "model", compute_dtype=dtype)
    trained = recipe_and_config("llama-3.1-8b-healed")[0].healing.model_dump(mode="json") | {"kv_steps": 200}
    healed = recipe.changed("test", "healing", **trained)
    gpu = Compute(("cuda:0",), host_bytes=host * GB, device_bytes=device * GB)
    costs = step_costs(healed, config, fit_build(healed, config, gpu))
    assert highest(costs).device <= device * GB
    assert highest(costs).host <= host * GB
    assert {"heal", "heal-kv"} <= costs.keys()
    assert min(costs[step].reads for step in ("heal", "heal-kv")) > 1e12  # blocks come and go at each step
    whole = healed.changed("test", "healing", method="full")
    with pytest.raises(UserError, match=r"training by gradients holds the whole model, .* set healing.method to lora"):
        fit_build(whole, config, gpu)


def test_what_training_that_streams_can_do_without_is_named() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-healed")
    long = recipe.changed("test", "healing", length=8192, batch=64)
    with pytest.raises(UserError, match=r"\(step heal\), and .*; give more, or lower healing.batch or healing.length$"):
        fit_build(long, config, Compute(("cuda:0",), device_bytes=24 * GB))
    refit = recipe.changed("test", "healing", compensation="least-squares", sequences=64)
    with pytest.raises(UserError, match=r"as least squares over 14336 features take .* healing.compensation to norm"):
        fit_build(refit, config, Compute(("cuda:0",), device_bytes=12 * GB))


def test_a_target_is_priced_block_by_block() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-balanced")
    data = recipe.model_dump(mode="json")
    data["kv"].pop("reduction")
    recipe = Recipe.model_validate(data | {"target": {"itl": 0.8, "kv": 4.0}})
    limited = fit_build(recipe, config, Compute(host_bytes=24 * GB))
    cost = step_costs(recipe, config, limited)["target"]
    assert limited.streams(32)
    assert cost.peak.host <= 24 * GB
    assert cost.reads > 1e12


def test_engines_are_named_where_they_are_too_large() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-balanced")
    streamed = recipe.changed("test", "targets", onnx={"dtype": "float32"})
    costs = step_costs(streamed, config, fit_build(streamed, config, Compute(host_bytes=24 * GB)))
    assert costs["engines/onnx/prefill"].peak.host < 10 * GB
    recipe = recipe.changed("test", "targets", onnx={"dtype": "float32", "weights": "int8"})
    with pytest.raises(UserError, match=r"\(step engines/onnx/prefill\), as the builder of .* leave that target out"):
        fit_build(recipe, config, Compute(host_bytes=24 * GB))


def test_of_two_causes_that_of_the_step_which_does_not_fit_is_named() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-healed")
    gpu = Compute(("cuda:0",), device_bytes=400 * GB)
    trained = recipe.changed("test", "healing", method="full")
    engine = trained.changed("test", "targets", onnx={"dtype": "float32", "weights": "int8"})
    with pytest.raises(UserError, match=r"\(step engines/onnx/prefill\), as the builder of .* leave that target out"):
        fit_build(engine, config, replace(gpu, host_bytes=64 * GB))
    with pytest.raises(UserError, match=r"\(step (prefill|decode)\), and --memory is 6.0 GB and .*; give more$"):
        fit_build(trained, config, replace(gpu, host_bytes=6 * GB))
    refit = recipe.changed("test", "healing", compensation="least-squares", sequences=64, length=8192, batch=64)
    with pytest.raises(UserError, match=r"\(step heal\), and .*; give more, or lower healing.batch or healing.length$"):
        fit_build(refit, config, Compute(("cuda:0",), device_bytes=24 * GB))


def test_a_graph_is_priced_as_its_smallest_stage_is_built() -> None:
    config = recipe_and_config("llama-3.1-8b-balanced")[1]
    sizes, section = ModelSizes.of(config | {"tie_word_embeddings": True}), OnnxTarget(dtype="float16")
    least = next(lost for lost in range(sizes.blocks) if 2 * (sizes.total - lost * sizes.block) <= EXTERNAL)
    prices = [engine_memory(section, sizes, "bfloat16", lost) for lost in (0, least - 1, least)]
    assert prices[0] == prices[1] < 10 * GB
    assert prices[2] > 12 * sizes.total


def test_kept_experts_of_streamed_blocks_are_not_counted_twice() -> None:
    recipe, config = recipe_and_config("qwen3-30b-a3b-experts")
    limited = Compute(blocks_in_memory=1)
    plain = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update={"experts": None})})
    peaks = [step_costs(r, config, limited)["select-kv"].peak.host for r in (recipe, plain)]
    assert peaks[0] == peaks[1]


def test_hidden_states_shrink_where_one_block_is_too_much() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-pruned")
    least = highest(step_costs(recipe, config, Compute(blocks_in_memory=1))).host
    limited = fit_build(recipe, config, Compute(host_bytes=round(least - 0.4 * GB)))
    assert limited.blocks_in_memory == 1
    assert limited.state_bytes is not None
    assert highest(step_costs(recipe, config, limited)).host <= least - 0.4 * GB


def test_what_cannot_fit_is_one_sentence() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-pruned")
    with pytest.raises(UserError, match=r"^recipe \S+ needs at least \d\.\d GB of host memory \(step prune\), and "):
        fit_build(recipe, config, Compute(host_bytes=2 * GB))
    trained = recipe.changed("test", "healing", decode_steps=2)
    with pytest.raises(UserError, match=r"\(step heal\), as training by gradients holds the whole model, and --memory"):
        fit_build(trained, config, Compute(host_bytes=24 * GB))
    speaks = recipe.changed("test", "calibration", continuations="greedy")
    with pytest.raises(UserError, match=r"continuations greedy holds the whole model, and --memory .* set .* to text$"):
        fit_build(speaks, config, Compute(host_bytes=24 * GB))
    unknown = config | {"architectures": ["NoSuchForCausalLM"]}
    with pytest.raises(UserError, match="as blocks of NoSuchForCausalLM cannot be read as they run"):
        fit_build(recipe, unknown, Compute(host_bytes=24 * GB))
    with pytest.raises(UserError, match="Ray's workers hold whole models; build without --workers"):
        fit_build(recipe, config, Compute(host_bytes=24 * GB), workers=0)
    with pytest.raises(UserError, match="Ray's workers hold whole models; build without --workers"):
        fit_build(recipe, config, Compute(host_bytes=40 * GB), workers=4)
    assert not fit_build(recipe, config, Compute(host_bytes=40 * GB), workers=0).streams(32)  # all in a cluster
    with pytest.raises(UserError, match=r"\(step prune\), with 4 of Ray's workers, and .* give more, or fewer workers"):
        fit_build(recipe, config, Compute(host_bytes=8 * GB), workers=4)


def test_training_is_priced_by_its_method_its_stages_and_its_minutes() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-pruned")

    def cost(**healing: object) -> StepCost:
        return step_costs(recipe.changed("test", "healing", **healing), config, Compute())["heal"]

    full, lora = cost(decode_steps=500), cost(decode_steps=500, method="lora")
    assert lora.peak.host < full.peak.host - 60e9
    assert lora.disk < full.disk / 2
    assert full.disk == pytest.approx(24 * 5.87e9, rel=0.01)  # what is saved, twice while it is replaced
    both = cost(prefill_steps=500, decode_steps=500)
    assert both.peak.host - full.peak.host > 20e9  # prefill's trained weights are there while decode is trained
    checkpointed = cost(decode_steps=500, batch=32, gradient_checkpointing=True)
    assert checkpointed.peak.host < cost(decode_steps=500, batch=32).peak.host - 10e9
    overnight = cost(decode_steps=1_000_000, minutes=480)
    assert overnight.seconds(1e12, 1e9) == pytest.approx(480 * 60 + overnight.flops / 1e12)
    hours = cost(decode_steps=1_000_000).seconds(1e12, 1e9)
    assert hours > 1000 * 3600
    kv = step_costs(recipe.changed("test", "healing", kv_steps=100), config, Compute())["heal-kv"]
    assert kv.operations > 0
    assert kv.peak.host > full.peak.host - 10e9


def test_what_was_fitted_or_healed_before_is_priced_in_training() -> None:
    recipe, config = recipe_and_config("llama-3.1-8b-healed")
    recipe = recipe.changed("test", "model", compute_dtype="bfloat16")
    sizes, gpu = ModelSizes.of(config), Compute(("cuda:0",), blocks_in_memory=4).with_dtype("bfloat16")

    def cost(**healing: object) -> StepCost:
        return step_costs(recipe.changed("test", "healing", **healing), config, gpu)["heal"]

    both, decode = cost(), cost(prefill_steps=0)
    prefill = cost(decode_steps=0)
    runs = recipe.healing.decode_steps * 1.15  # three rates, a twentieth of the steps each
    trained = 2 * (sizes.block - sizes.kv) * (sizes.blocks - recipe.pruning.prefill_blocks)
    shared = 4 * sizes.blocks * block_bytes(config)  # passes of the step, whatever is trained
    assert both.reads - decode.reads - prefill.reads + shared == pytest.approx(runs * trained, rel=0.01)
    at_length = {"length": 2048, "batch": 64, "sequences": 64, "prefill_steps": 0}  # the training is the peak
    refitted = cost(**at_length, compensation="least-squares").peak.device - cost(**at_length).peak.device
    assert refitted == pytest.approx(2 * sizes.blocks * sizes.inner * sizes.hidden)
    projected = cost(**at_length, kv_only_blocks=4).peak.device - cost(**at_length).peak.device
    assert projected == pytest.approx(2 * 4 * (sizes.kv + sizes.hidden * (sizes.hidden + sizes.inner)))


def test_judging_and_inspecting_choose_blocks_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", num_hidden_layers=8, hidden_size=512, intermediate_size=2048)
    pair, block = ([folder, folder], [folder]), 4 * (4 * 512 * 512 + 3 * 512 * 2048)
    whole = fit_judging(pair, 512, Compute(host_bytes=4 * GB))
    assert not whole.streams(8)
    tight = fit_judging(pair, 512, Compute(host_bytes=round(PROGRAM + 0.26e9 + 9 * block)))
    assert tight.streams(8)
    with pytest.raises(
        UserError, match=r"judging .*/m and .*/m needs at least 0\.\d GB of host memory, with one block"
    ):
        fit_judging(pair, 512, Compute(host_bytes=GB // 3))
    config = read_config(folder / "config.json")
    assert fit_one_model(config, 64, Compute(host_bytes=round(PROGRAM + 6 * block)), "m").streams(8)
    with pytest.raises(UserError, match=r"^m needs at least"):
        fit_one_model(config, 64, Compute(host_bytes=GB // 2), "m")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--memory", "24"], "'24' is no size above 0 with its unit, such as 24GB or 512MB"),
        (["--memory", "0GB"], "is no size above 0"),
        (["--device", "cpu", "--device-memory", "24GB"], "--device-memory limits GPUs, but the model runs on the CPU"),
        (["--memory", "1GB", "--dry-run"], "needs at least"),
        (["--memory", "1GB"], "needs at least"),
    ],
)
def test_bad_sizes_are_one_sentence(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "build", ROOT / "recipes" / "llama-3.1-8b-pruned.yaml", "--out", tmp_path / "b", *more)
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "b").exists()


def test_a_dry_run_prices_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "llama-3.1-8b-pruned.yaml"
    _, out, _ = run(capsys, "build", recipe, "--out", tmp_path / "b", "--dry-run", "--memory", "24GB")
    printed = [line for line in out.splitlines() if line.startswith("  ")]
    lines = {line.split()[0]: line for line in reversed(printed)}  # the first of each name: sizes stand behind steps
    for step in ("source", "prune", "select-kv", "prefill", "decode", "seal"):
        assert "GB of memory" in lines[step]
    assert "about" in lines["prune"]
    assert "of weights from disk" in lines["select-kv"]
    assert "about 35 s" in lines["prefill"]  # 15.62 GB at the rate at which stages are written
    assert "about" in lines["seal"]
