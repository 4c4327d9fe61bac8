import pytest
import torch
from searches import stages_of
from tinypd import BLOCKS, FAMILIES, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.redundancy import redundancy


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_cosine_of_transformers_hidden_states_without_token_0(family):
    model, ids = tiny(family), text(5, 12)
    inputs = [[] for _ in range(BLOCKS + 1)]
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: inputs[i].append((args[0], out)))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    expected = [
        torch.cosine_similarity(before[:, 1:], after[:, 1:], dim=-1).mean() for ((before, after),) in inputs[:BLOCKS]
    ]
    got = redundancy(model, ids, batch=2)
    torch.testing.assert_close(got, torch.stack(expected).double(), atol=1e-6, rtol=0)
    assert got.std() > 1e-3


def test_a_block_that_does_nothing_is_wholly_redundant():
    model = tiny("Llama")
    model.model.layers[3].self_attn.o_proj.weight.data.zero_()
    model.model.layers[3].mlp.down_proj.weight.data.zero_()
    score = redundancy(model, text(2, 12))
    assert float(score[3]) == pytest.approx(1, abs=1e-6)
    assert score.argmax() == 3


def test_weights_that_are_no_numbers_rank_nothing():
    broken = tiny("Llama")
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="hidden states are not numbers"):
        find(broken, text(2, 12))
    for method in ("cosine", "streamline"):
        with pytest.raises(UserError, match="hidden states are not numbers"):
            stages_of(broken, text(2, 12), 0, 1, method=method)
