"""Key offsets measured on models whose keys hold a constant, and on some whose keys hold none."""

from types import SimpleNamespace

import pytest
import torch
from ropes import ROPES
from tinypd import BLOCKS, DIM, KV_HEADS, biased, make_oracle, make_plan, text, tiny

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, rotate
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.kvchoice.budget.effects import Measure
from pdtrim_deploy.kvchoice.offsets import measure
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend

LONG = 800  # so many tokens that chance helps nobody
INT4 = (KVSend(wire_dtype="int4"),) * BLOCKS


@pytest.fixture(scope="module")
def model():
    return biased()


@pytest.fixture(scope="module")
def measured(model):
    return measure(make_oracle(model, make_plan()), text(8, 48), lambda _: None)


def silent(_):
    pass


@pytest.mark.parametrize("rope", ROPES)
def test_means_are_those_of_keys_before_rope(rope):
    model, plan, ids = biased(rope_parameters=ROPES[rope]), make_plan(decode=(1,)), text(4, 32)
    offsets = measure(make_oracle(model, plan), ids, silent).offsets
    seen = {}
    for block in plan.decode_layers:
        model.model.layers[block].self_attn.k_proj.register_forward_hook(
            lambda _m, _a, out, block=block: seen.setdefault(block, out)
        )
    with torch.no_grad():
        model(ids[:3])
    for layer, block in enumerate(plan.decode_layers):  # three of four sequences, less their first tokens
        mean = seen[block][:, 1:].flatten(0, 1).mean(0).view(KV_HEADS, DIM)
        torch.testing.assert_close(offsets.means[layer], mean, rtol=1e-4, atol=1e-3)


def test_errors_say_what_it_brings(measured):
    assert measured.offsets.file.layers == tuple(range(BLOCKS))
    assert len(measured.errors) == BLOCKS
    assert all(with_offsets < without / 10 for heads in measured.errors for without, with_offsets in heads)


def test_decode_reads_nearly_the_native_keys(model, measured):
    native, ids = make_oracle(model, make_plan()), text(3, 80, seed=5)
    state = native.prefill(ids[:, :64])
    expected = native.score(state, ids[:, 64:])
    without = native.with_kv(INT4).score(state, ids[:, 64:])
    with_offsets = native.with_offsets(measured.offsets).with_kv(INT4).score(state, ids[:, 64:])
    assert (with_offsets - expected).square().mean() < (
        without - expected
    ).square().mean() / 4  # values are rounded too


def test_a_budget_is_judged_on_keys_less_their_offset(model, measured):
    plain = make_oracle(model, make_plan())
    harm = [
        Measure(Problem(oracle, text(4, 40, seed=9), 32), (KVSend(), INT4[0]), silent).divergence(INT4)
        for oracle in (plain, plain.with_offsets(measured.offsets))
    ]
    assert harm[1] < harm[0] / 4


def test_an_oracle_has_the_offsets_of_its_plan_and_no_others(model, measured):
    oracle = make_oracle(model, make_plan())
    with_offsets = oracle.with_offsets(measured.offsets)
    assert with_offsets.with_kv(INT4).plan.key_offsets == measured.offsets.file
    assert with_offsets.with_offsets(None).plan == oracle.plan
    with pytest.raises(ValueError, match="not the plan's"):
        PDOracle(model, model, with_offsets.plan)
    with pytest.raises(ValueError, match="not the plan's"):
        PDOracle(model, model, oracle.plan, measured.offsets)


class FixedKeys:
    """An oracle's prefill that makes given keys `[sequences, layers, tokens, heads, dim]`, RoPE included."""

    def __init__(self, model, keys):
        self.prefill_model, self.plan, self._keys = model, make_plan(), iter(keys)

    def prefill(self, _):
        return SimpleNamespace(keys=tuple(next(self._keys)))


def test_heads_without_a_constant_have_none_and_layers_of_such_heads_are_left_out():
    keys = torch.randn(20, BLOCKS, LONG, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    model = tiny("Llama")
    constant, rotary = torch.full((DIM,), 9.0), KeyOffsets.make({0: torch.zeros(1, DIM)}, torch.ones(1), 1.0)
    rotary.frequencies = model.model.rotary_emb.inv_freq
    rotary._tables = [torch.empty(0, DIM)]
    turned = rotate(constant, *rotary.table(LONG)[:LONG].chunk(2, -1))
    keys[:, 2, :, 1] += turned
    keys[:, 4, :, 0, 3] = torch.nan
    offsets = measure(FixedKeys(model, keys), text(20, LONG), silent).offsets
    assert offsets.file.layers == (2,)
    assert not offsets.means[2][0].any()
    torch.testing.assert_close(offsets.means[2][1], constant, rtol=0, atol=0.3)


def test_a_model_whose_keys_hold_no_constant_has_no_offsets():
    keys = torch.randn(20, BLOCKS, LONG, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    assert measure(FixedKeys(tiny("Llama"), keys), text(20, LONG), silent).offsets is None
