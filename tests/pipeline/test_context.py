"""What the steps of a build share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.recipe import Recipe


def test_text_that_several_steps_read_is_drawn_once(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"source": f"hf:{tiny_llama_dir}", "dtype": "float32"}
    recipe = Recipe.model_validate({"name": "t", "model": model, "calibration": {"corpus": f"dir:{text}"}})
    cache = Cache(tmp_path / "cache")
    context = Context(recipe, resolve(recipe.model.source, cache), cache, tmp_path / "b", lambda _: None)
    mixed, draws = corpora.mixed, list[object]()
    monkeypatch.setattr(corpora, "mixed", lambda *args, **named: draws.append(args) or mixed(*args, **named))
    first = context.calibration(4, 32)
    before = first.clone()
    first.zero_()  # a step may write into its text
    assert torch.equal(context.calibration(4, 32, 16), before)
    assert len(draws) == 1
    assert not torch.equal(context.calibration(4, 48)[:, :32], before)
    assert len(draws) == 2
