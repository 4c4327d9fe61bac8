"""The checkpoint of blocks that make K and V alone: MLPs that never run are narrow, all else is whole."""

import json

import pytest
import torch
from tinyfamilies import taking

from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.body import body_width, narrowed
from pdtrim_deploy.models.families import family_of
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import write_stage

WIDTH = 64  # 16 for each of four heads


@pytest.mark.parametrize("architecture", taking("kv_only_blocks"))
def test_all_but_the_mlps_is_the_model_s(architecture, tiny_dir, cache, tmp_path):
    checkpoint = resolve(f"hf:{tiny_dir(architecture)}", cache)
    width = body_width(checkpoint.config, quantized=False)
    assert width == WIDTH
    write_stage(checkpoint, tmp_path / "body", [4, 5], "float32", {}, mlp_width=width)
    model, body = load_model(checkpoint.path), load_model(tmp_path / "body")
    assert body.config.intermediate_size == WIDTH < model.config.intermediate_size
    for at, block in enumerate((4, 5)):
        whole = dict(model.model.layers[block].named_parameters())
        for name, tensor in body.model.layers[at].named_parameters():
            assert torch.equal(tensor, whole[name][tuple(map(slice, tensor.shape))])
            assert (tensor.shape == whole[name].shape) is not (name.startswith("mlp.") and tensor.dim() > 1)
    ids = torch.arange(3, 43).reshape(2, 20)
    assert body(ids).logits.isfinite().all()


@pytest.mark.parametrize(("heads", "ranks"), [(9, 3), (14, 7), (32, 8), (40, 5), (64, 16)])
def test_ranks_that_divide_heads_divide_the_width_into_sixteens(heads, ranks):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": 1, "hidden_size": 64 * heads}
    width = body_width(sizes | {"intermediate_size": 28672}, quantized=False)
    assert width is not None
    assert width % (16 * ranks) == 0


def test_quantised_and_narrow_mlps_stay_as_they_are(tiny_llama_dir):
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    assert body_width(config, quantized=True) is None
    assert body_width(config | {"intermediate_size": WIDTH}, quantized=False) is None
    assert narrowed(family_of(config, "here"), config, [1], None) == {}
