"""A build from FP8 weights: it chooses what a build from the same weights in bfloat16 chooses, and writes FP8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tinyfp8 import write_fp8

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.recipe import Recipe


def recipe(source: Path, text: Path, **sections: object) -> Recipe:
    data: dict[str, object] = {
        "name": "tiny",
        "model": {"source": f"hf:{source}", "dtype": "bfloat16"},
        "calibration": {"corpus": f"dir:{text}", "sequences": 4, "length": 64},
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 1},
        "healing": {"compensation": "least-squares", "kv_only_blocks": 1, "sequences": 8, "length": 64},
        "kv": {"method": "none", "wire_dtype": "int4", "prompt_tokens": 24},
        "evaluation": {"corpus": f"dir:{text}", "sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
    }
    return Recipe.model_validate(data | sections)


@pytest.fixture(scope="module")
def source(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tiny_llama_dir, tmp_path_factory.mktemp("fp8") / "source", "compressed-channel", torch.bfloat16)


def blocks_of(bundle: Bundle, stage: str) -> tuple[int, ...]:
    return bundle.plan.layers(stage)  # type: ignore[arg-type]


def test_stages_are_in_the_sources_format(source: Path, text: Path, tmp_path: Path, cache: Cache) -> None:
    sizes = preview(recipe(source, text), tmp_path / "fp8", cache).stage_bytes
    bundle = build(recipe(source, text), tmp_path / "fp8", cache)
    # what codes and scales stand for, in float32: bfloat16 would round it
    floats = build(recipe(_unrounded(source, tmp_path), text), tmp_path / "float", cache)
    chosen, expected = (json.loads((b.path / "reports" / "pruning.json").read_text()) for b in (bundle, floats))
    for stage in chosen:  # the same blocks, and the same losses to the last digit
        assert [chosen[stage][key] for key in ("removed", "loss")] == [
            expected[stage][key] for key in ("removed", "loss")
        ]
    original = load_file(source / "model.safetensors")
    requantised = set()
    for stage in ("prefill", "decode"):
        stored = load_file(bundle.path / stage / "model.safetensors")
        assert sizes is not None
        assert sum(tensor.nbytes for tensor in stored.values()) == pytest.approx(sizes[stage], rel=0.06)  # type: ignore[index]
        for name, tensor in stored.items():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(blocks_of(bundle, stage)[int(parts[2])])
            before = original[".".join(parts)]
            assert (tensor.dtype, tensor.shape) == (before.dtype, before.shape)
            if not torch.equal(tensor.float(), before.float()):
                requantised.add((stage, ".".join(parts[2:])))
    kv_only = bundle.plan.kv_only_layers
    assert kv_only
    assert requantised
    changed = {leaf.split(".", 1)[1] for _, leaf in requantised}
    assert "self_attn.o_proj.weight" in changed  # zeros
    assert {leaf.rpartition(".")[0] for leaf in changed} <= {
        *(f"self_attn.{side}_proj" for side in "kvo"), "mlp.down_proj",
    }  # fmt: skip
    prefill = load_model(bundle.path / "prefill")
    assert not prefill.model.layers[kv_only[0]].self_attn.o_proj.weight.any()
    # a changed weight is within half of a code's step of the one that was fitted
    fitted = load_model(floats.path / "prefill").state_dict()
    for name, weight in prefill.state_dict().items():
        assert ((weight - fitted[name]).abs() <= fitted[name].abs() / 14 + fitted[name].abs().max() / 400).all(), name


def _unrounded(source: Path, tmp_path: Path) -> Path:
    """The source's weights in float32."""
    folder = tmp_path / "unrounded"
    model = load_model(source)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_what_fp8_weights_cannot_have_is_refused(source: Path, text: Path, tmp_path: Path, cache: Cache) -> None:
    for sections, words in (
        (
            {"model": {"source": f"hf:{source}", "dtype": "float32"}},
            "model.dtype is float32, in which SGLang has no FP8",
        ),
        (
            {"targets": {"onnx": {}}},
            "targets has onnx, but no engine computes with weights in FP8 in compressed-tensors",
        ),
    ):
        for run in (preview, build):
            with pytest.raises(UserError, match=words):
                run(recipe(source, text, **sections), tmp_path / "out", cache)
            assert not (tmp_path / "out").exists()


def test_config_alone_tells_sizes_and_refusals(source: Path, text: Path, tmp_path: Path, cache: Cache) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((source / "config.json").read_text())
    sizes = preview(recipe(alone, text), tmp_path / "b", cache).stage_bytes
    known = preview(recipe(source, text), tmp_path / "b", cache).stage_bytes
    assert sizes == {stage: pytest.approx(known[stage], rel=0.05) for stage in STAGES}
    with pytest.raises(UserError, match=r"model\.dtype is float32, in which SGLang has no FP8 weights"):
        preview(recipe(alone, text, model={"source": f"hf:{alone}", "dtype": "float32"}), tmp_path / "b", cache)
