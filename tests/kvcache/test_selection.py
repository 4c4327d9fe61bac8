import subprocess
import sys

import pytest
import torch
from tinypd import BLOCKS, make_oracle, make_plan, text, tiny

from pdtrim_deploy import recipe
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.perplexity import pd_perplexity
from pdtrim_deploy.kvcache.attention_mass import attention_mass
from pdtrim_deploy.kvcache.selection import SELECTIONS, Request, get_selection
from pdtrim_deploy.kvcache.selection.by_harm import ByMeasuredHarm
from pdtrim_deploy.plan import KVSend

CUT = KVSend(mode="sparse", n_first=1, n_last=2)


def quiet(_):
    pass


def make_request(sparse_layers, decode=(3,)):
    oracle = make_oracle(tiny("Qwen3"), make_plan(decode=decode))
    return Request(oracle, text(5, 24), 14, sparse_layers, CUT.n_first, CUT.n_last)


def sparse_of(kv):
    return [layer for layer, send in enumerate(kv) if send == CUT]


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_method_gives_one_rule_a_layer(name):
    request = make_request(2)
    kv = get_selection(name).choose(request, quiet)
    assert kv == get_selection(name).choose(request, quiet)
    assert len(kv) == BLOCKS - 1
    assert set(kv) <= {CUT, KVSend()}
    assert len(sparse_of(kv)) == {"none": 0, "all": BLOCKS - 1}.get(name, 2)
    request.oracle.with_kv(kv)  # a valid plan


def test_attention_mass_takes_the_layers_with_most_mass():
    request = make_request(2)
    kept = attention_mass(request.oracle, request.sequences, 14, 1, 2).kept
    assert sparse_of(get_selection("attention-mass").choose(request, quiet)) == sorted(kept.topk(2).indices.tolist())


def test_harm_is_the_rise_of_pd_loss_and_the_least_harmful_go():
    request = make_request(2)
    whole = pd_perplexity(request.oracle, request.sequences, 14)
    rises = []
    for layer in range(request.layers):
        cut = pd_perplexity(request.oracle.with_kv(request.sends((layer,))), request.sequences, 14)
        rises.append((cut.nll_mean - whole.nll_mean) * 10 / 9)  # decode predicts 9 of the 10 tokens
    expected = torch.tensor(rises, dtype=torch.float64)
    torch.testing.assert_close(ByMeasuredHarm(batch=2).harms(request, quiet), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1e-3
    assert sparse_of(get_selection("measured-harm").choose(request, quiet)) == sorted(expected.argsort()[:2].tolist())


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="KV method 'h2o' is unknown; use one of none, all, attention-mass"):
        get_selection("h2o")
    with pytest.raises(UserError, match="sparse_layers is 5 but decode keeps 4 layers; choose at most 4"):
        make_request(5)
    request = make_request(1)
    request.oracle.decode_model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not a number"):
        get_selection("measured-harm").choose(request, quiet)


def test_the_recipe_knows_every_method():
    assert set(recipe.KV_METHODS) == set(SELECTIONS)


def test_kvcache_imports_no_transformers():
    code = "import sys, pdtrim_deploy.kvcache.selection; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
