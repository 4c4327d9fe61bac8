"""`plan` of models with linear attention, from config.json alone, in the sizes of Qwen3-Next-80B-A3B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import run

from pdtrim_deploy.models.weights import ModelSizes

NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048,
    "intermediate_size": 5120, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts": 512, "num_experts_per_tok": 10, "decoder_sparse_step": 1, "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 262144, "torch_dtype": "bfloat16",
}  # fmt: skip
KINDS = (["linear_attention"] * 3 + ["full_attention"]) * 12
STATE = 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
RECIPE = "name: mine\nmodel: {source: 'hf:nowhere', dtype: bfloat16}\nkv: {method: none, wire_dtype: k4v3}\n"


def plan(
    capsys: pytest.CaptureFixture[str], folder: Path, config: dict[str, Any], *args: str, recipe: str = RECIPE
) -> tuple[int, str, str]:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.yaml").write_text(recipe)
    return run(capsys, "plan", folder / "mine.yaml", "--config", folder / "config.json", "--isl", 4096, *args)


@pytest.mark.parametrize("change", [{}, {"full_attention_interval": None}, {"layer_types": KINDS}])
def test_a_state_is_in_every_sum_and_named_apart(change, capsys, tmp_path: Path) -> None:
    config = {key: value for key, value in (NEXT | change).items() if value is not None}
    code, out, err = plan(capsys, tmp_path, config, "--json")
    assert (code, err) == (0, "")
    (priced,) = json.loads(out)["prices"]
    row = 12 * 2 * 2 * 256 * 2  # bytes of a token's K and V in all layers that have them
    assert STATE == 77_266_944
    assert priced["dense"]["request_bytes"] == 4096 * row + STATE
    assert priced["dense"]["state_bytes"] == priced["planned"]["state_bytes"] == STATE
    assert priced["dense"]["decode_pool_bytes"] == (4096 + 256) * row + STATE
    kv = priced["planned"]["request_bytes"] - STATE
    assert 4096 * row / kv == pytest.approx(4.26, abs=0.01)
    assert priced["reduction"] == pytest.approx((4096 * row + STATE) / (kv + STATE))
    assert priced["reduction"] < 2, "the state, which is not compressed, is most of what is left"
    code, out, _ = plan(capsys, tmp_path, config)
    assert "36 of 48 blocks have linear attention and keep a state in the place of KV" in out
    assert "77,266,944 bytes a request whatever its length: 77% of the planned bytes at 4096 tokens" in out


def test_weights_are_as_many_as_published() -> None:
    """80 billion, of which 3 are active."""
    assert ModelSizes.of(NEXT).total == pytest.approx(79.7e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": KINDS[::-1]}, "SGLang 0.5.23 reads full_attention_interval alone"),
        ({"layer_types": KINDS, "full_attention_interval": 3}, "SGLang 0.5.23 reads full_attention_interval alone"),
        ({"layer_types": ["mamba", *KINDS[1:]]}, "keep a state instead of KV .layer_types has mamba"),
        ({"layer_types": KINDS[1:]}, "must have one of full_attention, linear_attention for each of 48 blocks"),
        ({"layer_types": ["linear_attention"] * 48}, "has no full_attention, so that there is no KV to plan"),
        ({"full_attention_interval": 1}, "it must be from 2 to the number of blocks, 48"),
        ({"full_attention_interval": 49}, "it must be from 2 to the number of blocks, 48"),
        ({"full_attention_interval": "4"}, "key full_attention_interval is '4'; it must be a whole number"),
        ({"linear_num_key_heads": 5}, "do not go together in linear attention"),
        ({"linear_key_head_dim": -1}, "key linear_key_head_dim is -1; it must be a whole number"),
        ({"mamba_ssm_dtype": "int8"}, "key mamba_ssm_dtype is 'int8'; it must be one of float32, bfloat16, float16"),
    ],
)
def test_a_config_that_sglang_would_read_otherwise_is_refused(change, words, capsys, tmp_path: Path) -> None:
    code, out, err = plan(capsys, tmp_path, NEXT | change)
    assert (code, out) == (2, "")
    assert words.replace(".layer", "(layer") in err


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("kv: {method: all, n_first: 4, n_last: 60}", "whose other layers keep a state, all rows of KV travel"),
        ("kv: {method: budget, reduction: 4}", "allowed: none, with any kv.wire_dtype"),
        ("pruning: {method: greedy, decode_blocks: 2}", "the KV alone is known, not its blocks; allowed: 0"),
        ("healing: {kv_only_blocks: 2}", "the KV alone is known, not its blocks; allowed: 0"),
    ],
)
def test_what_such_models_do_not_take_is_refused(section, words, capsys, tmp_path: Path) -> None:
    recipe = f"name: mine\nmodel: {{source: 'hf:x', dtype: bfloat16}}\n{section}\n"
    code, out, err = plan(capsys, tmp_path, NEXT, recipe=recipe)
    assert (code, out) == (2, "")
    assert words in err
