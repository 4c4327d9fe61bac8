"""Sizes from config.json: the parts are those of real modules, and what stands for them elsewhere fits."""

import pytest
from tinypd import FAMILIES, tiny

from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.shape import shipped
from pdtrim_deploy.models.weights import ModelSizes, _mlp, _mlps
from pdtrim_deploy.plan.blocks import KV_ONLY_SHARE


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_modules(family):
    model = tiny(family)
    sizes, layer = ModelSizes.of(model.config.to_dict()), model.model.layers[0]

    def weights(module):
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    assert sizes.block == weights(layer)
    assert sizes.kv == weights(layer.self_attn.k_proj) + weights(layer.self_attn.v_proj)
    assert sizes.total == weights(model)
    assert sizes.kv_width == layer.self_attn.k_proj.out_features
    assert (sizes.hidden, sizes.inner) == (layer.mlp.down_proj.out_features, layer.mlp.down_proj.in_features)


@pytest.mark.parametrize("name", shipped())
def test_the_mlps_of_a_model_are_those_of_its_blocks(name):
    config = read_config(shipped()[name])
    for first in (0, 1, 3):  # with dense blocks before those of experts
        config |= {"first_k_dense_replace": first}
        weights = [_mlp(config, block) for block in range(config["num_hidden_layers"])]
        assert _mlps(config) == weights


def test_a_block_for_its_kv_alone_is_no_more_work_than_plans_count():
    """Of dense models: a token runs few of a block's experts, so that a block's weights are not its work."""
    configs = {name: read_config(path) for name, path in shipped().items()}
    expert_keys = {"moe_intermediate_size", "num_local_experts"}
    dense = {name: ModelSizes.of(config) for name, config in configs.items() if not expert_keys & config.keys()}
    shares = {name: sizes.kv / sizes.block for name, sizes in dense.items()}
    assert 0 < len(shares) < len(shipped())
    assert 0.01 < min(shares.values()) <= max(shares.values()) <= KV_ONLY_SHARE, shares
