"""Every family through a build: recipe, plan, both stages, the PD oracle on what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tinyfamilies import taking

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.models import FAMILIES
from pdtrim_deploy.models.families import LATENT, STATEFUL, WINDOWED, known_family
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.family_fit import check_family
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.recipe import Recipe

KV_ALONE = "ArceeForCausalLM"
UNCUT = LATENT | STATEFUL


@pytest.fixture
def recipe(tmp_path, text):
    def make(folder: Path, **sections: object) -> Recipe:
        corpus = {"corpus": f"dir:{text}", "sequences": 2}
        kv = {"method": "budget", "reduction": 2.0, "sparse_choices": [[2, 4]], "wire_choices": ["int4"]}
        data = {
            "name": "asked",
            "model": {"source": f"hf:{folder}"},
            "calibration": corpus | {"length": 32},
            "kv": kv | {"sequences": 2, "prompt_tokens": 24, "continuation_tokens": 8},
            "evaluation": corpus | {"prompt_tokens": 24, "continuation_tokens": 8},
        }
        (tmp_path / "asked.yaml").write_text(yaml.safe_dump(data | sections))
        return Recipe.load(tmp_path / "asked.yaml")

    return make


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*FAMILIES, KV_ALONE, *sorted((WINDOWED | UNCUT).keys() - FAMILIES.keys())])
def test_recipe_to_oracle(architecture, recipe, tiny_dir, tmp_path, cache, record_property):
    """What the written pair computes is what the plan does to the dense model's modules."""
    cut = {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2} if architecture in FAMILIES else {}
    uncut = {"kv": {"method": "none", "wire_dtype": "int4"}} if architecture in UNCUT else {}
    bundle = build(recipe(tiny_dir(architecture), pruning=cut, **uncut), tmp_path / "b", cache)
    plan, dense = bundle.plan, load_model(tiny_dir(architecture))
    assert plan.model.architecture == architecture
    assert [len(plan.prefill_layers), len(plan.decode_layers)] == ([5, 4] if cut else [6, 6])
    assert (plan.dense_bytes(24) - plan.model.state_bytes) / plan.kv_bytes(24) > 1.9
    offsets = KeyOffsets.read(bundle.path / "decode", plan)
    written = PDOracle(*(load_model(bundle.path / stage) for stage in STAGES), plan, offsets)
    surgery = PDOracle(*(keep_blocks(dense, plan.layers(stage)) for stage in STAGES), plan, offsets)
    ids = torch.randint(3, 259, (32,), generator=torch.Generator().manual_seed(1))
    expected = surgery.logprobs(ids[:24], ids[24:])
    # Not to the bit: where a file's tensors lie in memory, other kernels may compute them.
    torch.testing.assert_close(written.logprobs(ids[:24], ids[24:]), expected, rtol=0, atol=1e-4)
    assert torch.equal(written.greedy(ids[:24], 6), surgery.greedy(ids[:24], 6))
    for column in ("plan", "kv", *(["prune"] if cut else [])):
        record_property("family", (architecture, column, "yes"))


CUT = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2}
REQUESTS = {
    "norm": {"pruning": CUT, "healing": {"compensation": "norm"}},
    "least-squares": {"pruning": CUT, "healing": {"compensation": "least-squares"}},
    "distil": {"pruning": CUT | {"method": "anneal", "distil": True}},
    "training": {"pruning": CUT, "healing": {"decode_steps": 1}},
    "kv_only_blocks": {"pruning": CUT, "healing": {"kv_only_blocks": 1}},
    "sublayers": {"pruning": {"decode_attentions": 1}},
}


@pytest.mark.parametrize("feature", REQUESTS)
def test_what_would_be_wrong_for_a_family_is_refused_with_its_reason(feature, recipe, tmp_path, record_property):
    request = recipe(tmp_path / "m", **REQUESTS[feature])
    refused = {name for name, family in FAMILIES.items() if feature in family.blocks.refused}
    assert refused
    for name, family in FAMILIES.items():
        if name not in refused:
            check_family(request, family)
            continue
        with pytest.raises(
            UserError, match=r"^recipe asked: (healing|pruning)\.\w+ is .* wrong for \w+: .*; allowed: "
        ):
            check_family(request, family)
        if feature == "training":
            record_property("family", (name, "heal", "refused"))


@pytest.mark.parametrize(
    "sections", [{"pruning": CUT}, {"healing": {"kv_only_blocks": 1}}, {"healing": {"kv_steps": 1}}]
)
def test_pruning_and_healing_need_known_blocks(sections, recipe, tiny_dir, tmp_path, cache):
    request = recipe(tiny_dir(KV_ALONE), **sections)
    words = r"of ArceeForCausalLM the KV alone is known, not its blocks; allowed: 0, or one of .*LlamaForCausalLM"
    with pytest.raises(UserError, match=words):
        build(request, tmp_path / "b", cache)
    with pytest.raises(UserError, match=words):
        preview(request, tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("architecture", [*sorted({*FAMILIES, *WINDOWED, *UNCUT} - set(taking("engines"))), KV_ALONE])
def test_engines_need_a_known_graph(architecture, recipe, tiny_dir, tmp_path, cache, record_property):
    """Before a stage is written; by the dry run too."""
    request = recipe(tiny_dir(architecture), targets={"onnx": {}}, kv={"method": "none"})
    words = rf"recipe asked: targets has onnx, but {architecture} has no engine: .*; leave targets out"
    with pytest.raises(UserError, match=words):
        build(request, tmp_path / "b", cache)
    with pytest.raises(UserError, match=words):
        preview(request, tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()
    record_property("family", (architecture, "engine", "refused"))


@pytest.mark.parametrize("architecture", LATENT)
def test_rows_of_latents_are_not_cut_and_their_blocks_not_pruned(architecture, recipe, tiny_dir, tmp_path, cache):
    with pytest.raises(
        UserError, match=rf"kv.method is budget, but of {architecture}, which keeps latents .* allowed: n"
    ):
        build(recipe(tiny_dir(architecture)), tmp_path / "b", cache)
    uncut = {"kv": {"method": "none", "wire_dtype": "int4"}}
    with pytest.raises(UserError, match=rf"of {architecture} the KV alone is known, not its blocks"):
        build(recipe(tiny_dir(architecture), pruning=CUT, **uncut), tmp_path / "b", cache)
    with pytest.raises(UserError, match=r"kv.wire_dtype is k4v3 .* a latent's, and its rope key's 16; allowed .* int4"):
        build(recipe(tiny_dir(architecture), kv=uncut["kv"] | {"wire_dtype": "k4v3"}), tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("architecture", STATEFUL)
def test_rows_beside_linear_attention_are_not_cut_and_its_blocks_not_pruned(
    architecture, recipe, tiny_dir, tmp_path, cache
):
    with pytest.raises(
        UserError, match=rf"kv.method is budget, but of {architecture}, whose other layers keep a state"
    ):
        build(recipe(tiny_dir(architecture)), tmp_path / "b", cache)
    uncut = {"kv": {"method": "none", "wire_dtype": "int4"}}
    with pytest.raises(UserError, match=rf"of {architecture} the KV alone is known, not its blocks"):
        build(recipe(tiny_dir(architecture), pruning=CUT, **uncut), tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


def test_a_family_that_nobody_wrote_a_file_of_is_no_error_by_itself():
    assert known_family(KV_ALONE).blocks is None


TRAINED = ("GraniteForCausalLM", "Olmo2ForCausalLM")


@pytest.mark.some_families(TRAINED, taking("training"))
def test_what_was_trained_is_what_was_written_and_k_and_v_are_the_dense_models(
    architecture, recipe, tiny_dir, tmp_path, cache, record_property
):
    healing = {"decode_steps": 24, "batch": 4, "sequences": 64, "length": 32, "learning_rate": 2e-4}
    if architecture in taking("norm"):
        healing["compensation"] = "norm"
    request = recipe(tiny_dir(architecture), pruning=CUT, healing=healing, kv={"method": "none"})
    bundle = build(request, tmp_path / "b", cache)
    written, dense = load_model(bundle.path / "decode"), load_model(tiny_dir(architecture))
    changed = set()
    for layer, block in enumerate(bundle.plan.decode_layers):
        before = dict(dense.model.layers[block].named_parameters())
        for name, parameter in written.model.layers[layer].named_parameters():
            if name.startswith(FROZEN):
                assert torch.equal(parameter, before[name]), (block, name)
            elif not torch.equal(parameter, before[name]):
                changed.add(name)
    assert {name for name in changed if "down_proj" in name} == {
        name for layer in dense.model.layers for name, _ in layer.named_parameters() if "down_proj" in name
    }
    assert not any(name.startswith("self_attn.k") for name in changed)
    record_property("family", (architecture, "heal", "yes"))
