"""Sequences of KV's text that repeat a passage are of every corpus of a mixture; builds know by which rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinytext import write_words

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pipeline.build_steps import steps_of
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.kv_problem import problem_of
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import Recipe

PROMPT, MORE, COUNT, SHARE = 96, 8, 16, 0.25


def recipe_of(source: Path, shares: dict[str, float]) -> Recipe:
    kv: dict[str, Any] = {"method": "budget", "reduction": 1.5, "recall": SHARE, "prompt_tokens": PROMPT}
    kv |= {"sparse_choices": [[4, 16]], "sequences": COUNT, "continuation_tokens": MORE}
    mixture = [{"corpus": name, "share": share} for name, share in shares.items()]
    data = {"name": "mixed", "model": {"source": f"hf:{source}"}, "kv": kv, "calibration": {"mixture": mixture}}
    return Recipe.model_validate(data)


@pytest.mark.parametrize("corpora", [2, 4])
def test_every_corpus_of_a_mixture_has_its_part_of_the_recall(
    tmp_path: Path, tiny_llama_dir: Path, corpora: int
) -> None:
    """They take turns: every fourth sequence is of one corpus."""
    shares = {f"dir:{write_words(tmp_path / str(number), words=400)}": 1.0 for number in range(corpora)}
    recipe = recipe_of(tiny_llama_dir, shares)
    checkpoint = resolve(recipe.model.source, Cache(tmp_path / "cache"))
    context = Context(recipe, checkpoint, Cache(tmp_path / "cache"), tmp_path / "b", lambda _: None)
    plan = PDPlan.dense(context.shape)
    text = problem_of(context, PDOracle(context.model, context.model, plan), PROMPT, plan, None).sequences
    read = context.calibration(COUNT, PROMPT + MORE, PROMPT)
    recalled = [row for row in range(COUNT) if not text[row].equal(read[row])]
    assert len(recalled) == round(SHARE * COUNT)
    assert {row % corpora for row in recalled} == set(range(corpora))


def test_what_was_chosen_on_other_text_is_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(shares: dict[str, float]) -> dict[str, str]:
        return {step.name: step.key for step in steps_of(recipe_of(tmp_path, shares), "f")}

    alone, mixed = keys({"brown": 1.0}), keys({"brown": 1.0, "code": 1.0})
    monkeypatch.setattr("pdtrim_deploy.pipeline.build_steps.MIXED_VERSION", 0)
    assert keys({"brown": 1.0}) == alone, "the text of a single corpus is what it was"
    changed = {name for name, key in keys({"brown": 1.0, "code": 1.0}).items() if key != mixed[name]}
    assert changed == {"select-kv", "prefill", "decode"}


def test_a_corpus_stands_in_a_mixture_once(tmp_path: Path) -> None:
    """Twice, each of its sequences would be read twice."""
    path = tmp_path / "recipe.yaml"
    parts = "[{corpus: brown, share: 1}, {corpus: code, share: 1}, {corpus: brown, share: 2}]"
    path.write_text(f"name: x\nmodel: {{source: 'hf:m'}}\ncalibration: {{mixture: {parts}}}\n")
    with pytest.raises(UserError, match="names brown twice; allowed: each corpus once"):
        Recipe.load(path)
