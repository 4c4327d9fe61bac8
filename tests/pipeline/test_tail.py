"""Bundles whose plan has a tail: what lies in them, read in every dtype and block by block, and files that are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import run
from safetensors.torch import load_file, save_file
from tinyfp8 import write_fp8

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY
from pdtrim_deploy.recipe import Recipe

TAIL, PROMPT = 8, 24
SECOND = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


def recipe(source: Path, text: Path, dtype: str = "float32", tail: int = TAIL, **sections: object) -> Recipe:
    corpus = f"dir:{text}"
    healing = {"kv_only_blocks": 2, "compensation": "least-squares", "sequences": 8, "length": 48}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"source": f"hf:{source}", "dtype": dtype},
            "calibration": {"corpus": corpus, "sequences": 4, "length": 48},
            "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 1},
            "healing": healing | ({"kv_only_tail": tail} if tail else {}),
            "kv": {"method": "all", "n_first": 2, "n_last": 8},
            "evaluation": {"corpus": corpus, "sequences": 2, "prompt_tokens": PROMPT, "continuation_tokens": 8},
            **sections,
        }
    )


def ids(length: int = PROMPT) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1))


def logprobs(bundle: Bundle, compute: Compute = ON_CPU) -> torch.Tensor:
    return oracle_of(bundle, lambda _: None, compute).logprobs(ids(), ids(6))


@pytest.fixture(scope="module")
def bundle(tiny_dir: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("tail")
    return build(recipe(tiny_dir("Qwen3ForCausalLM"), text), folder / "b", Cache(folder / "cache"))


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle.path, tmp_path / "copied")))


def test_servers_find_the_model_s_own_layers_and_no_other_weights(bundle: Bundle, tiny_dir: Callable[[str], Path]):
    original = load_file(tiny_dir("Qwen3ForCausalLM") / "model.safetensors")
    assert [file.name for file in bundle.prefill_dir.glob("*.safetensors")] == ["model.safetensors"]
    stored = load_file(bundle.prefill_dir / "model.safetensors")
    second, refitted = load_file(bundle.prefill_dir / KV_ONLY), []
    for layer in bundle.plan.kv_only_layers:
        block = bundle.plan.prefill_layers[layer]
        whole = {name: tensor for name, tensor in stored.items() if name.startswith(f"model.layers.{layer}.")}
        for name, tensor in whole.items():
            inner = name.removeprefix(f"model.layers.{layer}.")
            assert torch.equal(tensor, original[f"model.layers.{block}.{inner}"])
        refitted += [not torch.equal(second[f"{block}.{n}"], whole[f"model.layers.{layer}.{n}"]) for n in SECOND]
    assert any(refitted)  # not the first of them, where nothing was left out before it
    assert not (bundle.decode_dir / KV_ONLY).exists()


def test_other_tails_share_what_was_fitted(
    bundle: Bundle, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """And without one the same tensors lie in the checkpoint itself."""
    cache = Cache(bundle.path.parent / "cache")
    none = build(recipe(tiny_dir("Qwen3ForCausalLM"), text, tail=0), tmp_path / "none", cache)
    assert none.plan == bundle.plan.with_parts(kv_only_tail=0)
    assert not (none.prefill_dir / KV_ONLY).exists()
    stored, second = load_file(none.prefill_dir / "model.safetensors"), load_file(bundle.prefill_dir / KV_ONLY)
    for layer in none.plan.kv_only_layers:
        for name in SECOND:
            block = none.plan.prefill_layers[layer]
            assert torch.equal(stored[f"model.layers.{layer}.{name}"], second[f"{block}.{name}"])


def test_another_tail_in_the_same_folder_is_built_again(
    bundle: Bundle, copied: Bundle, tiny_dir: Callable[[str], Path], text: Path
) -> None:
    """Its weights come from the cache, but plan and checkpoints say the tail."""
    cache, source = Cache(bundle.path.parent / "cache"), tiny_dir("Qwen3ForCausalLM")
    other = build(recipe(source, text, tail=TAIL + 4), copied.path, cache)
    assert other.plan == bundle.plan.with_parts(kv_only_tail=TAIL + 4)
    assert json.loads((other.prefill_dir / "config.json").read_text())["pdtrim"]["kv_only_tail"] == TAIL + 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_come_and_go_give_the_same_weights_and_scores(
    dtype: str, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = recipe(tiny_dir("Qwen2ForCausalLM"), text, dtype)
    whole = build(source, tmp_path / "whole", Cache(tmp_path / "c"))
    bounded = build(source, tmp_path / "bounded", Cache(tmp_path / "d"), compute=Compute(blocks_in_memory=2))
    for name in ("model.safetensors", KV_ONLY):
        assert (bounded.prefill_dir / name).read_bytes() == (whole.prefill_dir / name).read_bytes()
    assert {str(t.dtype) for t in load_file(whole.prefill_dir / KV_ONLY).values()} == {f"torch.{dtype}"}
    streamed = logprobs(whole, ON_CPU.with_blocks(2))
    assert torch.equal(streamed, logprobs(whole))


def test_layers_of_fp8_weights_stay_so_and_second_projections_are_not(
    tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    source = write_fp8(tiny_llama_dir, tmp_path / "source", "compressed-channel", torch.bfloat16)
    bundle = build(recipe(source, text, "bfloat16"), tmp_path / "b", Cache(tmp_path / "c"))
    stored, original = load_file(bundle.prefill_dir / "model.safetensors"), load_file(source / "model.safetensors")
    for layer in bundle.plan.kv_only_layers:
        block = bundle.plan.prefill_layers[layer]
        for name, tensor in stored.items():
            if name.startswith(f"model.layers.{layer}."):
                inner = name.removeprefix(f"model.layers.{layer}.")
                assert torch.equal(
                    tensor.view(torch.uint8), original[f"model.layers.{block}.{inner}"].view(torch.uint8)
                )
    assert {tensor.dtype for tensor in load_file(bundle.prefill_dir / KV_ONLY).values()} == {torch.bfloat16}
    oracle = oracle_of(bundle, lambda _: None, ON_CPU, rounds_inputs=True)
    plain = oracle_of(bundle, lambda _: None, ON_CPU)
    for layer in bundle.plan.kv_only_layers:
        whole = oracle.prefill_model.model.layers[layer]
        alone = vars(whole)["kv_only"]
        assert whole.self_attn.k_proj._forward_pre_hooks  # rounds to FP8, as its own weights are served
        assert not alone.self_attn.k_proj._forward_pre_hooks
        assert not alone.self_attn.v_proj._forward_pre_hooks
    assert not torch.equal(oracle.logprobs(ids(), ids(6)), plain.logprobs(ids(), ids(6)))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "missing, and with it the plan's second K and V projections"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "truncated, or not a file of second K and V"),
    "no safetensors": (lambda file: file.write_bytes(b"\xff\xfe"), "truncated, or not a file of second K and V"),
    "other blocks": (lambda file: save_file({f"9.{SECOND[0]}": torch.ones(2, 2)}, file), "is of blocks [9], the plan"),
    "other heads": (
        lambda file: save_file({name: tensor[:-1].clone() for name, tensor in load_file(file).items()}, file),
        "has no self_attn.k_proj.weight of 32 rows for block",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence(capsys: pytest.CaptureFixture[str], copied: Bundle, damage: str) -> None:
    change, words = DAMAGES[damage]
    file = copied.prefill_dir / KV_ONLY
    change(file)
    with pytest.raises(UserError) as refused:
        oracle_of(copied, lambda _: None, ON_CPU)
    assert f"{file}: {words}" in str(refused.value)
    assert "copy it from the bundle that the plan is of, or build the bundle again" in str(refused.value)
    code, out, _ = run(capsys, "verify", copied.path)
    assert (code, f"prefill/{KV_ONLY} " in out) == (1, True)


@pytest.mark.parametrize("command", ["eval", "fidelity"])
def test_commands_end_with_that_sentence(capsys: pytest.CaptureFixture[str], copied: Bundle, command: str) -> None:
    (copied.prefill_dir / KV_ONLY).unlink()
    more = ("http://127.0.0.1:1",) if command == "fidelity" else ()
    code, _, err = run(capsys, command, copied.path, *more)
    assert code == 2
    assert f"{KV_ONLY}: missing, and with it the plan's second K and V projections" in err.splitlines()[-1]


def test_it_is_sealed_and_shown(capsys: pytest.CaptureFixture[str], bundle: Bundle) -> None:
    assert f"prefill/{KV_ONLY}" in bundle.manifest.files
    assert run(capsys, "verify", bundle.path)[0] == 0
    code, out, _ = run(capsys, "inspect", bundle.path)
    assert code == 0
    assert f"kv_only: but for a prompt's last {TAIL} tokens" in " ".join(out.split())
    code, out, _ = run(capsys, "inspect", bundle.path, "--json")
    assert json.loads(out)["plan"]["kv_only_tail"] == TAIL
    assert PDPlan.load(bundle.path / "plan.json").kv_only_tail == TAIL
    card = (bundle.prefill_dir / "README.md").read_text()
    assert f"but for the last {TAIL} tokens of a prompt: " in card
    assert "--cuda-graph-backend-prefill disabled" in card


def test_sizes_count_the_file(bundle: Bundle, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    source, cache = tiny_dir("Qwen3ForCausalLM"), Cache(tmp_path / "c")
    with_tail, without = recipe(source, text), recipe(source, text, tail=0)
    sizes = [preview(r, tmp_path / "b", cache).stage_bytes for r in (with_tail, without)]
    config = json.loads((source / "config.json").read_text())
    costs = [step_costs(r, config, ON_CPU)["prefill"] for r in (with_tail, without)]
    second = sum(load_file(bundle.prefill_dir / KV_ONLY)[f"{bundle.plan.prefill_layers[layer]}.{name}"].nbytes
                 for layer in bundle.plan.kv_only_layers for name in SECOND)  # fmt: skip
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0]["prefill"] - sizes[1]["prefill"] == second
    assert sizes[0]["decode"] == sizes[1]["decode"]
    assert costs[0].written - costs[1].written == second
    assert costs[0].disk - costs[1].disk == 2 * second  # once more in .build, while it is written
