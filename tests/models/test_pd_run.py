"""Both stages layer by layer against the oracle, which runs one stage after the other."""

import pytest
import torch
from tinypd import FAMILIES, make_oracle, make_plan, text, tiny

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.pd_run import PDRun, mean_nll, sequence_nll


def run_of(oracle, ids, prompt, batch=2):
    stages = Blockwise(oracle.prefill_model), Blockwise(oracle.decode_model)
    return PDRun(*stages, oracle.plan.layer_map, ids.split(batch), prompt)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logprobs_are_those_of_the_oracle(family):
    model, ids, prompt = tiny(family), text(5, 18), 8
    oracle = make_oracle(model, make_plan(prefill=(3,), decode=(1, 3)))
    expected = oracle.score(oracle.prefill(ids[:, :prompt]), ids[:, prompt:])
    parts = run_of(oracle, ids, prompt).logprobs()
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=0)
    assert mean_nll(parts) == pytest.approx(-float(expected.double().mean()), abs=1e-5)
    assert sequence_nll(expected).tolist() == pytest.approx((-expected.double().sum(1) / 10).tolist())


@torch.no_grad()
def test_a_fork_goes_on_by_itself():
    model, ids = tiny("Llama"), text(3, 16)
    oracle = make_oracle(model, make_plan())
    whole = torch.cat(run_of(oracle, ids, 8).logprobs())
    run = run_of(oracle, ids, 8)
    run.advance()
    without = run.fork()
    without.advance(adds=False)  # block 1 of prefill for its K and V alone
    run.advance()
    assert not torch.allclose(torch.cat(without.logprobs()), whole, atol=1e-3)
    torch.testing.assert_close(torch.cat(run.logprobs()), whole)


@torch.no_grad()
def test_a_layer_for_its_kv_alone_leaves_the_state_and_a_student_takes_its_place():
    model, ids = tiny("Qwen3"), text(2, 10)
    run, kvs = LayerRun(Blockwise(model), [ids]), [LayerKV()]
    before = run.states[0]
    run.advance(kvs, adds=False)
    assert run.states[0] is before
    assert kvs[0].keys.shape[2] == 10
    other = run.fork()
    run.advance()
    other.advance(student=model.model.layers[2])
    assert not torch.allclose(run.states[0], other.states[0], atol=1e-3)
    assert (run.layer, other.layer) == (2, 2)
    other.advance(layer=3)
    assert other.layer == 4
