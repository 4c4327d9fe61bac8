"""Bundles whose plan has a tail: what lies in them, read in every dtype and block by block, and files that are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import run
from safetensors.torch import load_file
from tinyfp8 import write_fp8

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models import surgery
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.build_steps import steps_of
from pdtrim_deploy.pipeline.heal import HEALING
from pdtrim_deploy.pipeline.journal import chained_key
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.pipeline.step_costs import step_costs
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import BODY
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
            "pruning": {"method": "cosine", "decode_blocks": 1},
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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def body_of(bundle: Bundle) -> Path:
    return bundle.prefill_dir / BODY


def test_the_tail_has_the_model_s_own_weights(bundle: Bundle, tiny_dir: Callable[[str], Path]) -> None:
    assert_equal(weights(bundle.prefill_dir), weights(tiny_dir("Qwen3ForCausalLM")))
    assert not (bundle.decode_dir / BODY).exists()


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_the_body_has_the_last_blocks_alone_which_make_kv_alone(bundle: Bundle) -> None:
    model, body, blocks = weights(bundle.prefill_dir), weights(body_of(bundle)), bundle.plan.kv_only_blocks
    assert blocks == bundle.plan.prefill_layers[-2:]
    config = json.loads((body_of(bundle) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)  # of 128: its MLPs never run
    assert {name.split(".")[2] for name in body if ".layers." in name} == {"0", "1"}
    for at, block in enumerate(blocks):
        of_block = {name for name in body if f".layers.{at}." in name}
        changed = {
            name.split(".", 3)[3]
            for name in of_block
            if not torch.equal(body[name], model[name.replace(f".{at}.", f".{block}.", 1)])
        }
        assert {"mlp.down_proj.weight", "self_attn.o_proj.weight"} <= changed  # zero
        assert bool(changed & set(SECOND)) is (at == 1)  # the first reads the model's own state


def test_tails_share_what_is_fitted_and_what_is_trained_alike(
    bundle: Bundle, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    cache, source = Cache(bundle.path.parent / "cache"), tiny_dir("Qwen3ForCausalLM")

    def weights_key(tail: int, steps: int = 0) -> str:
        healing = {"kv_only_blocks": 2, "sequences": 8, "length": 48, "kv_only_tail": tail, "prefill_steps": steps}
        out = build(recipe(source, text, healing=healing), tmp_path / f"{tail}-{steps}", cache).path
        digest: str = json.loads((out / HEALING).read_text())["weights"]
        return digest

    assert weights_key(TAIL) == weights_key(12) != weights_key(0)
    assert (
        len({weights_key(tail, steps=1) for tail in (0, TAIL, 12, 16)}) == 3
    )  # 12 positions of 24 count, whatever the tail


def test_another_tail_in_the_same_folder_is_built_again(
    bundle: Bundle, copied: Bundle, tiny_dir: Callable[[str], Path], text: Path
) -> None:
    """Its weights come from the cache, but plan and checkpoints say the tail."""
    cache, source = Cache(bundle.path.parent / "cache"), tiny_dir("Qwen3ForCausalLM")
    other = build(recipe(source, text, tail=TAIL + 4), copied.path, cache)
    assert other.plan == bundle.plan.with_parts(kv_only_tail=TAIL + 4)
    assert json.loads((other.prefill_dir / "config.json").read_text())["pdtrim"]["kv_only_tail"] == TAIL + 4


def test_a_folder_has_a_body_only_where_its_plan_has_a_tail(
    bundle: Bundle, copied: Bundle, tiny_dir: Callable[[str], Path], text: Path
) -> None:
    cache, source = Cache(bundle.path.parent / "cache"), tiny_dir("Qwen3ForCausalLM")
    none = build(recipe(source, text, tail=0), copied.path, cache)
    assert not body_of(none).exists()
    assert none.verify() == []
    again = build(recipe(source, text), copied.path, cache)
    assert again.verify() == []
    assert_equal(weights(body_of(again)), weights(body_of(bundle)))


def test_a_build_that_ends_between_both_checkpoints_goes_on(
    bundle: Bundle, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source, written = Cache(bundle.path.parent / "cache"), tiny_dir("Qwen3ForCausalLM"), surgery.write_stage

    def write(checkpoint: object, out: Path, *args: object, **more: object) -> None:
        if out.name == BODY:
            (out.parent / f".{BODY}.new-killed").mkdir()  # as a process that is killed leaves it
            raise KeyboardInterrupt
        written(checkpoint, out, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(surgery, "write_stage", write)
    with pytest.raises(KeyboardInterrupt):
        build(recipe(source, text), tmp_path / "b", cache)
    assert (tmp_path / "b" / "prefill" / "config.json").is_file()
    with pytest.raises(UserError, match="not a complete bundle"):
        Bundle.open(tmp_path / "b")
    monkeypatch.undo()
    again = build(recipe(source, text), tmp_path / "b", cache)
    assert again.verify() == []
    assert_equal(weights(body_of(again)), weights(body_of(bundle)))


def test_a_body_of_another_plan_is_one_sentence(copied: Bundle) -> None:
    config = body_of(copied) / "config.json"
    other = copied.plan.with_parts(kv_only_tail=TAIL + 1).model_dump(mode="json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pdtrim": other}))
    with pytest.raises(UserError, match=f"prefill/{BODY}/config.json was made for plan .*build the bundle again"):
        Bundle.open(copied.path)


def test_a_prefill_that_was_written_before_there_was_a_body_is_written_again(
    tiny_dir: Callable[[str], Path], text: Path
) -> None:
    """Its step was of the same recipe, and all its files stand."""
    with_tail, without = (
        {step.name: step.key for step in steps_of(recipe(tiny_dir("Qwen3ForCausalLM"), text, tail=tail), "f")}
        for tail in (TAIL, 0)
    )
    assert without["prefill"] == chained_key(without["select-kv"], "prefill")
    assert with_tail["prefill"] != chained_key(with_tail["select-kv"], "prefill")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_come_and_go_give_the_same_weights_and_scores(
    dtype: str, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source = recipe(tiny_dir("Qwen2ForCausalLM"), text, dtype)
    whole = build(source, tmp_path / "whole", Cache(tmp_path / "c"))
    bounded = build(source, tmp_path / "bounded", Cache(tmp_path / "d"), compute=Compute(blocks_in_memory=2))
    for folder in (Path(), Path(BODY)):
        files = [bundle.prefill_dir / folder / "model.safetensors" for bundle in (bounded, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert {str(tensor.dtype) for tensor in load_file(files[1]).values()} == {f"torch.{dtype}"}
    streamed = logprobs(whole, ON_CPU.with_blocks(2))
    close = {"rtol": 0.0, "atol": 2e-6}  # matrices lie elsewhere in memory, and products of them may differ by rounding
    torch.testing.assert_close(streamed, logprobs(whole), **(close if dtype == "float32" else {"rtol": 0, "atol": 0}))


def test_fp8_weights_stay_so_before_the_tail_and_in_it(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    source = write_fp8(tiny_llama_dir, tmp_path / "source", "compressed-channel", torch.bfloat16)
    bundle = build(recipe(source, text, "bfloat16"), tmp_path / "b", Cache(tmp_path / "c"))
    assert_equal(weights(bundle.prefill_dir), weights(source))
    body, first = weights(body_of(bundle)), bundle.plan.kv_only_blocks[0]
    kinds = {name: tensor.dtype for name, tensor in weights(source).items()}
    assert {name: tensor.dtype for name, tensor in body.items() if ".layers.0." in name} == {
        name.replace(f".{first}.", ".0.", 1): dtype for name, dtype in kinds.items() if f".layers.{first}." in name
    }
    assert torch.float8_e4m3fn in {tensor.dtype for name, tensor in body.items() if "k_proj" in name}
    rounded, plain = (oracle_of(bundle, lambda _: None, ON_CPU, rounds_inputs=rounds) for rounds in (True, False))
    assert not torch.equal(rounded.logprobs(ids(), ids(6)), plain.logprobs(ids(), ids(6)))


def test_a_bundle_without_the_folder_is_one_sentence(capsys: pytest.CaptureFixture[str], copied: Bundle) -> None:
    shutil.rmtree(body_of(copied))
    with pytest.raises(UserError) as refused:
        oracle_of(copied, lambda _: None, ON_CPU)
    assert f"{body_of(copied)}: missing, and with it the weights for all but the last {TAIL}" in str(refused.value)
    assert "copy it from the bundle that the plan is of, or build the bundle again" in str(refused.value)
    code, out, _ = run(capsys, "verify", copied.path)
    assert (code, f"prefill/{BODY}/model.safetensors " in out) == (1, True)


@pytest.mark.parametrize("command", ["eval", "fidelity", "deploy render"])
def test_commands_end_with_that_sentence(capsys: pytest.CaptureFixture[str], copied: Bundle, command: str) -> None:
    shutil.rmtree(body_of(copied))
    more = {"fidelity": ("http://127.0.0.1:1",), "deploy render": ("--dry-run",)}.get(command, ())
    code, _, err = run(capsys, *command.split(), copied.path, *more)
    assert code == 2
    assert f"{BODY}: missing, and with it the weights for all but the last {TAIL}" in err.splitlines()[-1]


def test_it_is_sealed_and_shown(capsys: pytest.CaptureFixture[str], bundle: Bundle) -> None:
    assert f"prefill/{BODY}/model.safetensors" in bundle.manifest.files
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


def test_sizes_count_both_checkpoints(
    bundle: Bundle, tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    source, cache = tiny_dir("Qwen3ForCausalLM"), Cache(tmp_path / "c")
    with_tail, without = recipe(source, text), recipe(source, text, tail=0)
    sizes = [preview(r, tmp_path / "b", cache).stage_bytes for r in (with_tail, without)]
    config = json.loads((source / "config.json").read_text())
    costs = [step_costs(r, config, ON_CPU)["prefill"] for r in (with_tail, without)]
    assert sizes[0] is not None
    assert sizes[1] is not None
    tensors = sum(t.nbytes for folder in (bundle.prefill_dir, body_of(bundle)) for t in weights(folder).values())
    assert sizes[1]["prefill"] < sizes[0]["prefill"] == tensors < 2 * sizes[1]["prefill"]
    assert sizes[0]["decode"] == sizes[1]["decode"]
    assert costs[0].written == costs[0].disk == pytest.approx(tensors, rel=0.01)
    assert costs[1].written < costs[0].written


def test_prefill_that_loses_blocks_has_no_tail_behind_healing(tiny_llama_dir: Path, text: Path) -> None:
    cut = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 1}
    sentence = r"healing.kv_only_tail is 8 and prefill loses blocks.*a prefill that loses nothing, or"
    with pytest.raises(ValueError, match=sentence):
        recipe(tiny_llama_dir, text, pruning=cut)
    none = {"kv_only_blocks": 2, "kv_only_tail": TAIL}
    with pytest.raises(ValueError, match=r"healing or students make up, but not in the tail"):
        recipe(tiny_llama_dir, text, pruning=cut | {"method": "anneal", "distil": True}, healing=none)
    assert recipe(tiny_llama_dir, text, pruning=cut, healing=none).healing.kv_only_tail == TAIL
