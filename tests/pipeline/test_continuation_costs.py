"""The price of the dense model's own words: the texts that a build really asks for, and what more tokens cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline import build, on_policy
from pdtrim_deploy.pipeline.continuation_costs import continuation_costs
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.recipe import Recipe

KV: dict[str, Any] = {
    "method": "attention-mass", "sparse_layers": 1, "n_first": 2, "n_last": 4, "sequences": 3, "prompt_tokens": 24,
    "continuation_tokens": 5,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_dir: Path, text: Path) -> Recipe:
    file = tmp_path / "recipe.yaml"
    corpus = {"corpus": f"dir:{text}"}
    file.write_text(
        yaml.safe_dump({
            "name": "own-words",
            "model": {"source": f"hf:{tiny_llama_dir}"},
            "calibration": corpus | {"sequences": 10, "length": 20, "continuations": "sampled", "prompt_tokens": 12},
            "pruning": {"method": "cosine", "decode_blocks": 1},
            "healing": {"compensation": "least-squares", "sequences": 9, "length": 16},
            "kv": KV,
            "evaluation": corpus,
        })
    )  # fmt: skip
    return Recipe.load(file)


def test_what_is_priced_is_what_a_build_asks_the_model_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of tokens that go through the model to write text, by step: prompts, and then a token at a time."""
    steps, step = dict[str, set[tuple[int, int, int]]](), "source"
    original: Callable[..., Any] = on_policy.with_continuations

    def counted(speaker: Any, section: Any, prompts: Any, tokens: int) -> Any:
        written = (len(prompts), prompts.shape[1] + tokens, prompts.shape[1])
        if not any(written in before for before in steps.values()):
            steps.setdefault(step, set()).add(written)
        return original(speaker, section, prompts, tokens)

    class Shown:
        def __init__(self, name: str, _: bool) -> None:
            nonlocal step
            step = name

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("pdtrim_deploy.pipeline.on_policy.with_continuations", counted)
    build(recipe, tmp_path / "out", Cache(tmp_path / "cache"), show=Shown)
    assert steps == {"prune": {(10, 20, 12)}, "heal": {(9, 16, 8)}, "select-kv": {(3, 29, 24)}}
    sizes = ModelSizes.of(read_config(Path(recipe.model.source.removeprefix("hf:")) / "config.json"))
    assert continuation_costs(recipe, sizes, 4).keys() == steps.keys()
    files = {name: cost.files for name, cost in continuation_costs(recipe, sizes, 4).items()}
    assert files == {"prune": 2 * 8 * 10 * 8, "heal": 2 * 8 * 9 * 8, "select-kv": 2 * 8 * 3 * 5}


def test_time_memory_and_files_grow_by_it(recipe: Recipe) -> None:
    config = read_config(Path(recipe.model.source.removeprefix("hf:")) / "config.json")
    plain = recipe.changed("test", "calibration", continuations="text")
    longer = recipe.changed("test", "calibration", length=20_000)
    spoken, silent, more = (step_costs(each, config, Compute()) for each in (recipe, plain, longer))
    for step in ("prune", "heal", "select-kv"):
        assert (spoken[step].flops or 0) > (silent[step].flops or 0)
        assert spoken[step].disk > silent[step].disk
    assert more["prune"].peak.host > spoken["prune"].peak.host + 4 * 8 * 20_000 * 2 * 2 * 16
    assert spoken["prefill"] == silent["prefill"]
