"""A block without a sublayer: left out in memory, zeros on disk, the same logits in every family that can be pruned."""

import pytest
import tinypd
import torch
from transformers import AutoModelForCausalLM

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.fidelity.controls import wrong_oracles
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.models.sublayers import NoAttention, NoMLP
from pdtrim_deploy.models.surgery import keep_blocks, write_stage
from pdtrim_deploy.plan import Drop, Keep, KVSend, PDPlan, WithoutAttention, WithoutMLP

BLOCKS, MISSING = [0, 2, 3, 5], {2: "attention", 5: "mlp"}
IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("architecture", FAMILIES)
def test_zeros_on_disk_are_no_sublayer(architecture, tiny_dir, cache, tmp_path):
    source = tiny_dir(architecture)
    dense = load_model(source)
    for name, parameter in dense.named_parameters():
        assert "o_proj" not in name or float(parameter.abs().sum()) > 0  # else there is nothing to lose
    cut = keep_blocks(dense, BLOCKS, missing=MISSING)
    assert isinstance(cut.model.layers[1].self_attn, NoAttention)
    assert isinstance(cut.model.layers[3].mlp, NoMLP)
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "stage", BLOCKS, "float32", {}, missing=MISSING)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    torch.testing.assert_close(logits(plain), logits(cut), rtol=1e-4, atol=1e-4)
    for sublayer in MISSING.values():  # each of them mattered
        other = {block: missing for block, missing in MISSING.items() if missing != sublayer}
        assert (logits(keep_blocks(dense, BLOCKS, missing=other)) - logits(cut)).abs().max() > 0.01


def test_experts_that_a_stage_keeps_are_zero_too(tiny_dir, tmp_path, cache):
    source = tiny_dir("Qwen3MoeForCausalLM")
    kept = dict.fromkeys(BLOCKS, (0, 2, 3))
    write_stage(
        resolve(f"hf:{source}", cache), tmp_path / "stage", BLOCKS, "float32", {}, experts=kept, missing=MISSING
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    cut = keep_blocks(load_model(source), BLOCKS, experts=kept, missing=MISSING)
    torch.testing.assert_close(logits(plain), logits(cut), rtol=1e-4, atol=1e-4)


def test_blocks_from_disk_skip_them_too(tiny_llama_dir, cache):
    checkpoint = resolve(f"hf:{tiny_llama_dir}", cache)
    model, blocks = stream_model(checkpoint, 1)
    whole = keep_blocks(load_model(tiny_llama_dir), BLOCKS, missing=MISSING)
    assert torch.equal(logits(keep_blocks(model, BLOCKS, missing=MISSING)), logits(whole))
    assert blocks.reads == len(BLOCKS)


def test_a_block_that_the_stage_does_not_run_lacks_nothing(tiny_llama_dir):
    with pytest.raises(UserError, match="block 1 is to run without its mlp but the stage does not run it"):
        keep_blocks(load_model(tiny_llama_dir), BLOCKS, missing={1: "mlp"})


def pd_plan(wire="int8"):
    """Decode runs block 1 without MLP, 2 and 0 without attention; prefill drops block 2, and 3's MLP."""
    keep, drop, no_attention, no_mlp = Keep(), Drop(), WithoutAttention(), WithoutMLP()
    return PDPlan(
        model=tinypd.make_plan().model,
        prefill=(keep, keep, drop, no_mlp, no_attention),
        decode=(no_attention, no_mlp, no_attention, keep, no_attention),
        kv=(KVSend(wire_dtype=wire),) * 2,
    )


def zero(layer, sublayer):
    projection = layer.self_attn.o_proj if sublayer == "attention" else layer.mlp.down_proj
    projection._parameters["weight"] = torch.zeros_like(projection.weight)


def test_the_oracle_skips_what_the_plan_says_and_reads_no_kv_for_it():
    model, plan = tinypd.tiny("Llama"), pd_plan()
    # as stages come from disk: all is there, and o_proj and down_proj are zero
    stages = [keep_blocks(model, plan.layers(stage)) for stage in ("prefill", "decode")]
    for stage, cut in zip(("prefill", "decode"), stages, strict=True):
        for block, sublayer in plan.missing(stage).items():
            zero(cut.model.layers[plan.layers(stage).index(block)], sublayer)
    text = tinypd.text(2, 24)
    oracle = PDOracle(*stages, plan)
    state = oracle.prefill(text[:, :14])
    assert len(state.keys) == 3  # blocks 0, 1 and 3: 2 is dropped, 4 has no attention
    assert plan.layer_map == (1, 2)
    held = oracle.hand_over(state)
    assert [kv.keys.shape[2] for kv in held] == [14, 14]
    scored = oracle.score(state, text[:, 14:])

    # The same with all blocks and all KV in place: what has zeros needs no rows, so garbage in them changes nothing.
    whole = PDPlan.dense(plan.model).with_kv((KVSend(wire_dtype="int8"),) * 5)
    full = [keep_blocks(model, range(5)) for _ in stages]
    for stage, cut in zip(("prefill", "decode"), full, strict=True):
        gone = dict.fromkeys(plan.dropped(stage), ("attention", "mlp"))
        gone |= {block: (sublayer,) for block, sublayer in plan.missing(stage).items()}
        for block, sublayers in gone.items():
            for sublayer in sublayers:
                zero(cut.model.layers[block], sublayer)
    reference = PDOracle(*full, whole)
    expected = reference.score(reference.prefill(text[:, :14]), text[:, 14:])
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_attention_that_is_gone_do_not_travel():
    plan = pd_plan("native")
    assert plan.payload_bytes(10) * 5 == plan.dense_bytes(10) * 2


def test_a_server_that_leaves_out_more_is_told_apart():
    """A control of `fidelity`: the same KV, one MLP fewer."""
    model, plan = tinypd.tiny("Llama"), pd_plan()
    oracle = PDOracle(*(keep_blocks(model, plan.layers(stage)) for stage in ("prefill", "decode")), plan)
    wrong = wrong_oracles(oracle, 14)["an MLP more left out"]
    assert wrong.plan.kv == plan.kv
    text = tinypd.text(2, 24)
    right, other = (each.score(each.prefill(text[:, :14]), text[:, 14:]) for each in (oracle, wrong))
    assert torch.equal(right[:, 0], other[:, 0])  # prefill's
    assert (right - other).abs().max() > 0.1
    dense = PDPlan.dense(plan.model)
    assert "an MLP more left out" not in wrong_oracles(PDOracle(model, model, dense), 14)
