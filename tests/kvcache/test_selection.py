import subprocess
import sys

import pytest
import torch
from tinypd import BLOCKS, VOCABULARY, make_oracle, make_plan, text, tiny

from pdtrim_deploy import recipe
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.attention_mass import attention_mass
from pdtrim_deploy.kvcache.selection import SELECTIONS, Request, get_selection
from pdtrim_deploy.kvcache.selection.by_harm import ByMeasuredHarm, interpolated
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


def divergence(request, sparse):
    """Mean KL from the oracle's own whole distributions, sequence by sequence."""
    total = 0.0
    for ids in request.sequences:
        rows = []
        for which in ((), sparse):
            oracle = request.oracle.with_kv(request.sends(which))
            top, logprobs = oracle.top_logprobs(ids[:14], ids[14:], VOCABULARY)
            rows.append(torch.zeros_like(logprobs).scatter(1, top, logprobs).double())
        assert torch.equal(rows[0][0], rows[1][0])  # the first token is prefill's: no KV rule changes it
        total += float((rows[0].exp() * (rows[0] - rows[1]))[1:].sum(1).mean())
    return total / len(request.sequences)


def test_harm_is_the_rise_of_divergence_and_the_least_harmful_go():
    request = make_request(2)
    layers = set(range(request.layers))
    alone, among = ByMeasuredHarm(batch=2).harms(request, quiet)
    for layer in layers:
        assert float(alone[layer]) == pytest.approx(divergence(request, {layer}), abs=1e-5)
        others = divergence(request, layers) - divergence(request, layers - {layer})
        assert float(among[layer]) == pytest.approx(others, abs=1e-5)
    assert alone.min() > 1e-3
    middle = (alone + among) / 2  # 2 of 4 layers
    assert sparse_of(get_selection("measured-harm").choose(request, quiet)) == sorted(middle.argsort()[:2].tolist())


def test_harm_moves_from_one_end_to_the_other():
    alone, among = torch.tensor([1.0, 2, 3, 4]), torch.tensor([8.0, 7, 6, 5])
    assert torch.equal(interpolated(alone, among, 0), alone)
    assert torch.equal(interpolated(alone, among, 4), among)
    assert torch.equal(interpolated(alone, among, 1), 0.75 * alone + 0.25 * among)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="KV method 'h2o' is unknown; use one of none, all, attention-mass"):
        get_selection("h2o")
    with pytest.raises(UserError, match="sparse_layers is 5 but decode keeps 4 layers; choose at most 4"):
        make_request(5)
    request = make_request(1)
    request.oracle.decode_model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="logits are not numbers"):
        get_selection("measured-harm").choose(request, quiet)


def test_the_recipe_knows_every_method():
    assert set(recipe.KV_METHODS) == set(SELECTIONS)


def test_kvcache_imports_no_transformers():
    code = "import sys, pdtrim_deploy.kvcache.selection; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
