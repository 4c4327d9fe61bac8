"""Steps that measure, on blocks that come from the checkpoint as they run: the whole model's bundle and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.judge_tasks import judge_tasks
from pdtrim_deploy.evaluation.quality import judge_bundle
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models import block_store
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.on_devices import load_to_compute
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.limits import highest
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.recipe import Recipe

BOUNDED = Compute(blocks_in_memory=2)
KV = {"sequences": 4, "prompt_tokens": 64, "continuation_tokens": 8}
METHODS = {
    "budget": KV | {"reduction": 3.0, "sparse_choices": [[4, 16], [2, 8]], "wire_choices": ["native", "int8"]},
    "measured-harm": KV | {"sparse_layers": 2, "n_first": 2, "n_last": 8},
    "attention-mass": KV | {"sparse_layers": 2, "n_first": 2, "n_last": 8, "wire_dtype": "int8"},
    "simlayerkv": KV | {"sparse_layers": 2, "n_first": 2, "n_last": 8},
}


def recipe_of(folder: Path, text: Path, method: str, **sections: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": f"hf:{folder}"},
            "calibration": {"corpus": f"dir:{text}", "sequences": 8, "length": 48},
            "kv": {"method": method, **METHODS[method]},
            "evaluation": {"corpus": f"dir:{text}", "sequences": 6, "prompt_tokens": 24, "continuation_tokens": 8},
            **sections,
        }
    )


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each reader had after each fetch; models that are loaded whole are refused."""
    counts: list[int] = []
    fetch = block_store.Blocks.__getitem__

    def counted(blocks: block_store.Blocks, block: int) -> dict[str, torch.Tensor]:
        tensors = fetch(blocks, block)
        counts.append(len(blocks.alive))
        return tensors

    monkeypatch.setattr(block_store.Blocks, "__getitem__", counted)
    return counts


def no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loading", "on_devices"):
        monkeypatch.setattr(f"pdtrim_deploy.models.{module}.load_model", None)


def built(recipe: Recipe, out: Path, compute: Compute) -> tuple[str, dict[str, bytes], list[str]]:
    """Digest of the plan, the weights and the reports that hold figures, and what was said."""
    lines: list[str] = []
    bundle = build(recipe, out, Cache(out.with_suffix(".cache")), lines.append, compute=compute)
    files = [out / stage / "model.safetensors" for stage in ("prefill", "decode")]
    files += [
        file for name in ("attention", "key-offsets", "kv") if (file := out / "reports" / f"{name}.json").exists()
    ]
    figures = [line for line in lines if "foretold" in line or line.startswith("without block")]
    return bundle.plan.digest, {str(file.relative_to(out)): file.read_bytes() for file in files}, figures


@pytest.mark.parametrize("method", METHODS)
def test_kv_is_chosen_as_on_the_whole_model(
    method: str, tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch, resident: list[int]
) -> None:
    recipe = recipe_of(tiny_llama_dir, text, method)
    whole = built(recipe, tmp_path / "whole", Compute())
    assert not resident
    no_whole_model(monkeypatch)
    assert built(recipe, tmp_path / "bounded", BOUNDED) == whole
    assert max(resident) == 2


def test_kv_only_blocks_are_ranked_and_fitted_as_on_the_whole_model(
    tmp_path: Path, tiny_dir: Callable[[str], Path], text: Path, monkeypatch: pytest.MonkeyPatch, resident: list[int]
) -> None:
    sections = {
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 1},
        "healing": {"kv_only_blocks": 2, "compensation": "least-squares", "sequences": 8, "length": 48},
    }
    recipe = recipe_of(tiny_dir("Qwen2ForCausalLM"), text, "measured-harm", **sections)
    whole = built(recipe, tmp_path / "whole", Compute())
    no_whole_model(monkeypatch)
    assert built(recipe, tmp_path / "bounded", BOUNDED) == whole
    assert max(resident) == 2


@pytest.mark.parametrize("kv_only", [0, 2])
def test_additions_of_low_rank_are_trained_as_on_the_whole_model(
    kv_only: int,
    tmp_path: Path,
    tiny_dir: Callable[[str], Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    resident: list[int],
) -> None:
    """Both stages, then decode behind the KV that arrives: the same weights, which differ from the model's.

    With KV-only blocks gradients come to prefill through decode.
    """
    healing = {
        "method": "lora", "lora_rank": 4, "prefill_steps": 8, "decode_steps": 8, "kv_steps": 8, "regression": 0.5,
        "learning_rate": 0.02, "sweep": [1.0], "batch": 4, "sequences": 16, "length": 48,
        "compensation": "least-squares", "kv_only_blocks": kv_only,
    }  # fmt: skip
    sections = {"pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2}, "healing": healing}
    recipe = recipe_of(tiny_dir("Qwen2ForCausalLM"), text, "measured-harm", **sections)
    whole = built(recipe, tmp_path / "whole", Compute())
    assert not resident
    no_whole_model(monkeypatch)
    assert built(recipe, tmp_path / "bounded", BOUNDED) == whole
    assert max(resident) == 2
    trained = [_trained(tmp_path / name) for name in ("whole", "bounded")]
    assert trained[0] == trained[1]
    assert any(figures["kept"] for figures in trained[1])


def _trained(bundle: Path) -> list[dict[str, Any]]:
    """Figures of each training, without its time."""
    first, last = (json.loads((bundle / "reports" / f"{name}.json").read_text()) for name in ("healing", "healing-kv"))
    names = ("steps", "before", "after", "kept")
    return [{name: figures[name] for name in names} for figures in (*first["healing"].values(), last)]


def test_a_target_is_answered_as_on_the_whole_model(
    tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch, resident: list[int]
) -> None:
    kv = {"method": "budget", **METHODS["budget"]}
    del kv["reduction"]
    target = {"itl": 0.85, "ttft": 0.85, "kv": 3.0, "rounds": 1}
    recipe = recipe_of(tiny_llama_dir, text, "budget", kv=kv, target=target)
    whole = built(recipe, tmp_path / "whole", Compute())
    assert not resident
    no_whole_model(monkeypatch)
    assert built(recipe, tmp_path / "bounded", BOUNDED) == whole
    assert max(resident) == 2
    files = [tmp_path / name / "reports" / "target.json" for name in ("whole", "bounded")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_effects_read_a_block_once_for_all_options_that_fit_side_by_side(
    tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer side by side: the same bundle, more reads."""
    readers: list[block_store.Blocks] = []
    init = block_store.Blocks.__init__

    def kept(blocks: block_store.Blocks, *args: object) -> None:
        init(blocks, *args)  # type: ignore[arg-type]
        readers.append(blocks)

    monkeypatch.setattr(block_store.Blocks, "__init__", kept)
    recipe = recipe_of(tiny_llama_dir, text, "budget")
    together = built(recipe, tmp_path / "together", Compute(blocks_in_memory=1))
    reads = sum(blocks.reads for blocks in readers)
    readers.clear()
    monkeypatch.setattr("pdtrim_deploy.pipeline.kv_problem.STATES", 1)
    assert built(recipe, tmp_path / "alone", Compute(blocks_in_memory=1)) == together
    assert sum(blocks.reads for blocks in readers) >= reads + 14  # 6 + 5 + ... + 1 in the place of 6, less a hit


def test_scores_and_tasks_are_those_of_whole_models(
    tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch, resident: list[int]
) -> None:
    recipe = recipe_of(tiny_llama_dir, text, "attention-mass", pruning={"method": "greedy", "decode_blocks": 2})
    cache = Cache(tmp_path / "cache")
    bundle = build(recipe, tmp_path / "b", cache)
    whole = judge_bundle(bundle, cache, {}, compute=Compute())
    tasks = judge_tasks(bundle, ["agreement"], cache, {}, size=3, compute=Compute())
    assert not resident
    no_whole_model(monkeypatch)
    streamed = judge_bundle(bundle, cache, {}, compute=Compute(blocks_in_memory=1))
    assert streamed == whole
    reads = len(resident)
    monkeypatch.setattr("pdtrim_deploy.evaluation.quality.STREAMED_KV", 0)  # a batch at a time
    assert judge_bundle(bundle, cache, {}, compute=Compute(blocks_in_memory=1)) == whole
    assert judge_tasks(bundle, ["agreement"], cache, {}, size=3, compute=Compute(blocks_in_memory=1)) == tasks
    assert reads
    assert max(resident) == 1


def test_the_oracle_of_fidelity_streams(bundle_of_tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 40)[None]
    folder = bundle_of_tiny.decode_dir
    whole = load_to_compute("decode", folder, "float32", compute=Compute(), rounds_inputs=True)(ids).logits
    no_whole_model(monkeypatch)
    model = load_to_compute("decode", folder, "float32", compute=Compute(blocks_in_memory=1), rounds_inputs=True)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert torch.equal(model(ids).logits, whole)


@pytest.fixture
def bundle_of_tiny(tmp_path: Path, tiny_llama_dir: Path, text: Path, cache: Cache) -> Bundle:
    return build(recipe_of(tiny_llama_dir, text, "attention-mass"), tmp_path / "b", cache)


def test_allowed_memory_chooses_the_blocks_and_changes_nothing(
    tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch, resident: list[int]
) -> None:
    recipe = recipe_of(tiny_llama_dir, text, "measured-harm", pruning={"method": "greedy", "decode_blocks": 1})
    config = read_config(tiny_llama_dir / "config.json")
    whole = built(recipe, tmp_path / "whole", Compute())
    three = highest(step_costs(recipe, config, Compute(blocks_in_memory=3))).host
    no_whole_model(monkeypatch)
    assert built(recipe, tmp_path / "bounded", Compute(host_bytes=round(three))) == whole
    assert max(resident) == 3
