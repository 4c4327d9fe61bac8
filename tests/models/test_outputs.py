"""The output parameters of a block: halved, they halve what its attention and its MLP give."""

import pytest
import torch
from tinyfamilies import taking

from pdtrim_deploy.models.families import FAMILIES
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.outputs import output_parameters
from pdtrim_deploy.models.streaming import whole_block

CASES = [(name, {}) for name in taking("norm")] + [("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True})]


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_halving_them_halves_what_a_block_adds(architecture, changes, tiny_model, tmp_path):
    model = load_model(tiny_model(tmp_path / "m", architecture, **changes))
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    angles = model.model.rotary_emb(x, position_ids=torch.arange(9)[None])
    for block in (1, 4):  # of GLM-4.5 one has an MLP, the other experts
        layer, halved = model.model.layers[block], whole_block(model, block)
        for name in output_parameters(halved):
            halved.get_parameter(name).mul_(0.5)
        added, expected = (out[0] if isinstance(out := part.mlp(x), tuple) else out for part in (halved, layer))
        torch.testing.assert_close(added, expected / 2)
        attended, expected = (
            part.self_attn(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
            for part in (halved, layer)
        )
        torch.testing.assert_close(attended, expected / 2)


def test_norms_behind_are_the_reason_to_refuse_it():
    assert set(FAMILIES) - set(taking("norm")) == {"Olmo2ForCausalLM", "Glm4ForCausalLM", "Gemma3ForCausalLM"}
