"""`fidelity --compute-dtype`: an oracle that does not round as the pair does, and which dtypes are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commandline import run
from tinytext import write_words

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.doctor import resources
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.fidelity.cases import Group
from pdtrim_deploy.evaluation.fidelity.client import Served
from pdtrim_deploy.local import processor
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

URL = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, cache: Cache) -> Bundle:
    folder = tmp_path_factory.mktemp("bfloat16")
    corpus = {"corpus": f"dir:{write_words(folder / 'text', files=40, words=1200)}"}
    recipe = {
        "name": "r",
        "model": {"source": f"hf:{tiny_llama_dir}", "dtype": "bfloat16"},
        "calibration": corpus,
        "kv": {"method": "none"},
        "evaluation": corpus,
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return build(Recipe.load(folder / "r.yaml"), folder / "b", cache)


@pytest.fixture
def pair(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers in place of a pair: the plan, computed in bfloat16 on a CPU that has it."""
    monkeypatch.setattr(processor, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    oracle = oracle_of(bundle, lambda _: None, ON_CPU.with_dtype("bfloat16"))

    def answers(url: str, group: Group, new_tokens: int, deadline_s: float) -> list[Served]:
        served = []
        for prompt in group.prompts:
            ids = torch.tensor(prompt)
            tokens = oracle.greedy(ids, new_tokens)
            logprobs = oracle.logprobs(ids, tokens)
            served.append(Served(prompt, tuple(tokens.tolist()), tuple(logprobs.tolist()), 0))
        return served

    monkeypatch.setattr("pdtrim_deploy.evaluation.fidelity.check.ask", answers)


@pytest.mark.usefixtures("pair")
def test_in_float32_the_oracle_rounds_nothing_of_its_own(
    bundle: Bundle, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a pair that computes as the oracle does by default, there is no difference; in float32, the pair's."""
    errors = {}
    for dtype, options in (("bfloat16", ()), ("float32", ("--compute-dtype", "float32"))):
        _, out, _ = run(
            capsys,
            "fidelity",
            bundle.path,
            URL,
            "--new-tokens",
            "2",
            "--json",
            "--cache-dir",
            str(cache.root),
            *options,
        )
        result = json.loads(out)
        assert (result["computed_in"], result["device"], result["noise"]) == (dtype, "cpu", 2.0**-9)
        assert json.loads((bundle.reports_dir / "fidelity.json").read_text()) == result
        errors[dtype] = result["error"]
    assert errors["bfloat16"]["typical"] < errors["float32"]["typical"] / 10
    assert 0 < errors["float32"]["typical"] < 0.25


def test_the_memory_of_the_dtype_is_asked_for(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `eval` too; the machine has enough for 16 bits alone."""
    estimates = [resources.needs(bundle.recipe, judged_in=dtype) for dtype in ("bfloat16", "float32")]
    total = sum(int(estimate.judge) for estimate in estimates if estimate is not None) // 2
    monkeypatch.setattr(resources, "memory", lambda: (total, total))
    monkeypatch.setattr("pdtrim_deploy.evaluation.fidelity.run_fidelity", lambda *_, **__: sys.exit(7))
    monkeypatch.setattr("pdtrim_deploy.evaluation.quality.judge_bundle", lambda *_: sys.exit(7))
    for command in (("fidelity", str(bundle.path), URL), ("eval", str(bundle.path))):
        for dtype, code in (("bfloat16", 7), ("float32", 2)):
            ended, _, err = run(capsys, *command, "--compute-dtype", dtype)
            assert ended == code
            assert ("memory to eval" in err) == (code == 2)


@pytest.mark.parametrize("features", [frozenset(), frozenset({"avx512_bf16"})])
def test_by_default_it_is_what_the_pair_computes_in(
    features: frozenset[str], bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "cpu_features", lambda: features)
    code, out, _ = run(capsys, "fidelity", bundle.path, URL, "--dry-run", "--json")
    assert (code, json.loads(out)["computed_in"]) == (0, "bfloat16" if features else "float32")
    code, out, _ = run(capsys, "fidelity", bundle.path, URL, "--dry-run", "--json", "--compute-dtype", "bfloat16")
    assert (code, json.loads(out)["computed_in"]) == (0, "bfloat16")


def test_a_dtype_that_rounds_otherwise_is_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fidelity", bundle.path, URL, "--dry-run", "--compute-dtype", "float16")
    assert (code, out) == (2, "")
    assert err == (
        "pdtrim-deploy: --compute-dtype float16: the bundle's pair computes in bfloat16, and an oracle in float16 "
        "rounds otherwise; give bfloat16 or float32\n"
    )
    assert run(capsys, "fidelity", bundle.path, URL, "--dry-run", "--compute-dtype", "int8")[0] == 2
