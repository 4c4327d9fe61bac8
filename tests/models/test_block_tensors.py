"""Tensors of blocks in a file: what goes in comes out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks

names = st.sampled_from(["mlp.down_proj.weight", "self_attn.k_proj.weight", "self_attn.k_proj.bias"])
block_sizes = st.dictionaries(st.integers(0, 99), st.dictionaries(names, st.integers(0, 4), min_size=1), max_size=4)


@given(block_sizes)
def test_what_goes_in_comes_out(tmp_path_factory, sizes):
    blocks = {b: {name: torch.randn(3, size).T for name, size in named.items()} for b, named in sizes.items()}
    file = tmp_path_factory.mktemp("blocks") / "stage.safetensors"
    save_blocks(blocks, file)
    restored = read_blocks(file)
    assert restored.keys() == blocks.keys()
    for block, named in blocks.items():
        assert restored[block].keys() == named.keys()
        assert all(torch.equal(restored[block][name], tensor) for name, tensor in named.items())
