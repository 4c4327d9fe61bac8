"""Models in 16 bits on a CPU: what is not a weight stays in float32, as where blocks are streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretended_devices import PretendedDevices

from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.on_devices import load_on, load_to_compute
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.streaming import keep_rows, stream_model
from pdtrim_deploy.plan import PDPlan

IN_16_BITS = Compute(("cpu",), "bfloat16")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Glm4MoeForCausalLM"])
def test_in_16_bits_it_is_the_streamed_model(architecture: str, tiny_dir: Callable[[str], Path]) -> None:
    """Positions behind 256 have no neighbour in bfloat16: their RoPE angles would be others'."""
    folder, ids = tiny_dir(architecture), torch.arange(3, 253).repeat(2)[None, :450]
    streamed = stream_model(read_checkpoint(folder), 1, IN_16_BITS)[0]
    with torch.no_grad():
        expected = streamed(ids).logits
        for model in (
            load_on(read_checkpoint(folder), IN_16_BITS),
            load_to_compute("decode", folder, "bfloat16", compute=IN_16_BITS),
            load_to_compute("decode", folder, "float32", compute=IN_16_BITS),
        ):
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
            assert torch.equal(model(ids).logits, expected)


def test_rows_of_rows(tiny_dir: Callable[[str], Path]) -> None:
    """A block read from disk that is cut twice has the second cut's rows of the first's."""
    whole = load_on(read_checkpoint(tiny_dir("Qwen3MoeForCausalLM")), Compute())
    streamed = stream_model(read_checkpoint(tiny_dir("Qwen3MoeForCausalLM")), 1)[0]
    expected = whole.model.layers[3].mlp.gate.weight[[2, 3]]
    gate = streamed.model.layers[3].mlp.gate
    for rows in ([1, 2, 3], [1, 2]):
        keep_rows(gate, "weight", rows)
    kept: list[torch.Tensor] = []
    gate.register_forward_pre_hook(lambda module, _: kept.append(module.weight.detach().clone()))
    gate(torch.zeros(1, whole.config.hidden_size))
    assert torch.equal(kept[0], expected)


@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniMaxM2ForCausalLM"])
def test_a_model_whose_blocks_are_not_known_moves_as_a_whole(
    architecture: str, tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))  # transformers asks, for its experts
    checkpoint, ids = read_checkpoint(tiny_dir(architecture)), torch.arange(3, 15)[None]
    here, both = Compute(), Compute(("cuda:0", "cuda:1"))
    runs = []
    for compute in (here, both):
        with PretendedDevices(), torch.no_grad():
            model = load_on(checkpoint, compute)
            runs.append(PDOracle(model, model, PDPlan.dense(checkpoint.shape())).prefill(ids).logits.cpu())
            places = {str(layer.self_attn.o_proj.weight.device) for layer in model.model.layers}
            assert places == ({"cpu"} if compute is here else {"cuda:0", "cuda:1"})
    torch.testing.assert_close(*runs)
