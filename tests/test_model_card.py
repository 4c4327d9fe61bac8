"""Model cards: what a reader of a stage checkpoint learns, and that measuring does not break the seal."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pdtrim_deploy import model_card
from pdtrim_deploy.bundle import UNSEALED
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.recipe import EvaluationSection, Recipe

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f" * 64, num_blocks=4, num_kv_heads=2, head_dim=8, kv_dtype="float32"
)
PLAN = PDPlan(
    model=SHAPE,
    prefill=(Keep(), Keep(), Drop(), Keep()),
    decode=(Keep(), Drop(), Drop(), Keep()),
    kv=(KVSend(), KVSend(mode="sparse", n_first=2, n_last=6)),
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {source: 'hf:somewhere/base'}\nevaluation: {prompt_tokens: 100, corpus: austen}\n"
    )
    return Recipe.load(tmp_path / "r.yaml")


@pytest.fixture
def written(tmp_path: Path, recipe: Recipe) -> Path:
    source, out = tmp_path / "base", tmp_path / "bundle"
    source.mkdir()
    (source / "LICENSE").write_text("text")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\nlanguage: [en]\n---\n# Base\n")
    for stage in ("prefill", "decode"):
        (out / stage).mkdir(parents=True)
    model_card.write_cards(out, PLAN, recipe, source)
    return out


def test_a_card_says_what_it_is(written: Path) -> None:
    text = (written / "decode" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other"
    assert front["license_name"] == "llama3.1"
    assert "language" not in front
    assert "hf:somewhere/base" in text
    assert PLAN.digest in text
    assert "Blocks: 2 of 4; without blocks 1, 2" in text
    assert "1 of 2 decode layers get the first and last prompt tokens alone (blocks 3)" in text
    row = 2 * 2 * 8 * 4
    assert f"{row * (100 + 8):,} bytes for 100 prompt tokens" in text
    assert "Carried over in `LICENSE`" in text
    assert "--model-path BUNDLE/decode --disaggregation-mode decode" in text
    assert "Blocks: 3 of 4; without block 2\n" in (written / "prefill" / "README.md").read_text()
    assert model_card.NOT_MEASURED in text


def test_the_measured_loss_takes_the_place_of_its_absence(written: Path) -> None:
    before = (written / "decode" / "README.md").read_text()
    for ratio in (1.25, 1.5):
        quality = SimpleNamespace(
            pd=SimpleNamespace(ppl=10 * ratio), dense=SimpleNamespace(ppl=10.0), ratio=ratio, tokens=512,
            text=EvaluationSection(corpus="austen", seed=3), dtype="float32",
            environment={"command": "pdtrim-deploy eval b"},
        )  # fmt: skip
        model_card.refresh_cards(written, quality)
        text = (written / "decode" / "README.md").read_text()
        assert f"ratio {ratio:.4f}" in text
        assert "`austen` (seed 3, float32); made by `pdtrim-deploy eval b`" in text
        assert len(re.findall("ratio", text)) == 1
    assert model_card.NOT_MEASURED not in text
    assert text.split(model_card.END)[1] == before.split(model_card.END)[1]


def test_without_a_licence_it_says_so(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "README.md").write_text("---\n: {bad\n---\n")
    assert model_card.licence(tmp_path) == {}
    text = model_card.card(PLAN, recipe, "prefill", model_card.licence(tmp_path))
    assert "states no licence" in text
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


def test_cards_are_not_sealed() -> None:
    assert {"prefill/README.md", "decode/README.md"} <= UNSEALED
