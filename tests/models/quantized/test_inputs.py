"""Inputs of layers with FP8 weights, rounded as where they are served."""

import pytest
import torch
from safetensors.torch import load_file
from tinyfp8 import IGNORED, write_fp8

from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.quantized.inputs import by_group, by_token

STATES = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]


def rounded(values):
    """To e4m3 under a scale that makes the largest one 448, by hand."""
    scale = values.abs().max() / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def test_each_token_has_a_scale_of_its_own():
    expected = torch.stack([torch.stack([rounded(row) for row in rows]) for rows in STATES])
    torch.testing.assert_close(by_token(STATES), expected, rtol=1e-6, atol=0)
    assert not torch.equal(expected, STATES)


def test_each_group_has_a_scale_of_its_own_and_the_last_may_be_shorter():
    groups = [torch.cat([rounded(row[:8]), rounded(row[8:16]), rounded(row[16:])]) for rows in STATES for row in rows]
    torch.testing.assert_close(by_group(STATES, 8), torch.stack(groups).reshape(STATES.shape), rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    assert torch.equal(by_token(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["modelopt", "fp8-tensor"])
def test_a_stored_scale_is_the_layers(kind, tiny_llama_dir, tmp_path):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", kind)
    assert load_file(folder / "model.safetensors")["model.layers.2.mlp.up_proj.input_scale"] == 0.25
    layer = load_model(folder, rounds_inputs=True).model.layers[2].mlp
    states = torch.tensor([[0.26, -200.0] + [0.0] * 62])
    seen = []
    for module in (layer.up_proj, layer.down_proj):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        module(torch.cat([states, states], 1)[:, : module.in_features])
    assert seen[0][0, :2].tolist() == [0.25, -112.0]  # 1.04 becomes 1, and -800 becomes -448
    assert torch.equal(seen[1][0, :2], states[0, :2])  # the ignored module reads what it is given
    assert IGNORED.endswith("2.mlp.down_proj")


def test_weights_that_are_not_quantised_are_left_alone(tiny_llama_dir):
    ids = torch.arange(3, 33)[None]
    with_inputs, without = (load_model(tiny_llama_dir, rounds_inputs=rounded)(ids).logits for rounded in (True, False))
    assert torch.equal(with_inputs, without)
