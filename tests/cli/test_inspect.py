"""`inspect MODEL`: the candidates as table, JSON and picture."""

import json
import random
import xml.etree.ElementTree as ET

import pytest
from commandline import run
from tinyfp8 import write_fp8


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text("".join(rng.choice("abcdefgh ,.") for _ in range(600)))
    return f"dir:{tmp_path}"


def test_a_model_shows_its_candidates(capsys, tiny_llama_dir, corpus, cache, tmp_path):
    common = ("--corpus", corpus, "--sequences", 2, "--threshold", -0.5, "--cache-dir", cache.root)
    picture = tmp_path / "out" / "c.svg"
    code, out, _ = run(capsys, "inspect", tiny_llama_dir, *common, "--json", "--picture", picture)
    assert code == 0
    shown = json.loads(out)
    assert shown["model"] == f"hf:{tiny_llama_dir}"
    assert len(shown["redundancy"]) == 6
    assert sorted([*shown["pruning"], *(b for p in shown["distillation"] for b in (p, p + 1))]) == list(range(6))
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")
    code, out, err = run(capsys, "inspect", f"hf:{tiny_llama_dir}", *common)
    assert code == 0
    assert [line for line in err.splitlines() if line.endswith(" ...")] == ["source ...", "inspect ..."]
    assert f"{shown['redundancy'][3]:.4f}" in out


def test_the_format_of_quantised_weights_is_named(capsys, tiny_llama_dir, corpus, cache, tmp_path):
    folder = write_fp8(tiny_llama_dir, tmp_path / "fp8", "fp8-block")
    common = ("--corpus", corpus, "--sequences", 2, "--cache-dir", cache.root)
    label = "FP8 in fp8 format (one scale for each 32 x 16 block)"
    assert json.loads(run(capsys, "inspect", folder, *common, "--json")[1])["weights"] == label
    assert f"weights: {label}" in run(capsys, "inspect", folder, *common)[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["gone", "--picture", "p.svg"], "--picture does not apply to a bundle"),
        (["hf:gone"], "gone: no such folder"),
        (["hf:gone", "--prompt-tokens", "4"], "--prompt-tokens does not apply to a model"),
        (["gone"], "gone: no such bundle"),
    ],
)
def test_bad_input_is_one_sentence(capsys, args, says, cache):
    code, _, err = run(capsys, "inspect", *args, "--cache-dir", cache.root)
    assert code == 2
    sentence = err.removeprefix("source ...\n")  # where it was looked for
    assert says in sentence
    assert sentence.count("\n") == 1
