"""Effects of both stages' actions and of KV rules on tiny models, against stages cut by surgery."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tinyjoint import BLOCKS, DENSE, FEW, PROMPT, SENDS, SHORT, make_measure
from tinypd import make_plan, text, tiny

from pdtrim_deploy.joint.choice import BlockChoice, block_choices, plan_of
from pdtrim_deploy.joint.effects import JointMeasure
from pdtrim_deploy.joint.solve import FeatureQuadratic
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.outputs import output_parameters
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.pruning.pair import StagePair


def changed(choices, **blocks):
    """`choices` with others at `b0`, `b1`, ..."""
    return tuple(blocks.get(f"b{block}", choice) for block, choice in enumerate(choices))


MIXED = changed(
    DENSE,
    b0=BlockChoice("without_mlp", "keep", SHORT),
    b1=BlockChoice("skip", "keep", SENDS[1]),
    b2=BlockChoice("without_attention", "drop"),
    b3=BlockChoice("keep", "without_mlp", FEW),
    b4=BlockChoice("skip", "without_attention"),
)


def exact(measure, choices):
    """KL(unpruned || choices) of all continuation tokens, of stages that surgery has cut."""
    oracle, prompt = measure.problem.oracle, PROMPT
    model = oracle.decode_model
    plan = plan_of(oracle.plan.model, choices)
    zeros = {
        block: {name: torch.zeros_like(layer.get_parameter(name)) for name in output_parameters(layer)}
        for block, layer in enumerate(model.model.layers)
        if choices[block].kv_only
    }
    pair = StagePair(model, plan).with_changes("prefill", zeros)
    pruned = PDOracle(pair.stage("prefill"), pair.stage("decode"), plan)
    total = []
    for ids in measure.problem.sequences:
        rows = []
        for each in (oracle, pruned):
            top, logprobs = each.top_logprobs(ids[:prompt], ids[prompt:], 97)
            rows.append(torch.zeros_like(logprobs).scatter(1, top, logprobs).double())
        total.append(float((rows[0].exp() * (rows[0] - rows[1])).sum(1).mean()))
    return sum(total) / len(total)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_measured_kl_is_that_of_stages_cut_by_surgery(family):
    measure = make_measure(family)
    assert measure.divergence(DENSE) == pytest.approx(0, abs=1e-6)
    for choices in (MIXED, changed(DENSE, b2=BlockChoice("skip", "keep", FEW))):
        assert measure.divergence(choices) == pytest.approx(exact(measure, choices), rel=1e-4)


def test_effects_lead_to_a_choice_and_from_it_back():
    """Seen from the unpruned pair, the harm of one change is that of the changed pair; seen from there, back is 0."""
    measure = make_measure(draws=3, batch=3)
    options = list(measure.options)
    dense, whole = measure.about(DENSE), options.index(BlockChoice())
    seen = FeatureQuadratic(dense.error, dense.linear, dense.gram, measure.parts)
    assert dense.error == pytest.approx(0, abs=1e-9)
    changes = [
        BlockChoice("skip", "keep"), BlockChoice("without_mlp", "keep"), BlockChoice("keep", "drop"),
        BlockChoice("keep", "without_attention"), BlockChoice("keep", "without_mlp"),
        BlockChoice("keep", "keep", FEW), BlockChoice("keep", "keep", SENDS[1]),
    ]  # fmt: skip
    for block, choice in zip((1, 3, 0, 2, 4, 1, 3), changes, strict=True):
        there = measure.about(changed(DENSE, **{f"b{block}": choice}))
        at = np.full(BLOCKS, whole)
        at[block] = options.index(choice)
        assert seen.harm(at) == pytest.approx(there.error / 2, rel=1e-4)
        back = FeatureQuadratic(there.error, there.linear, there.gram, measure.parts)
        assert back.harm(at * 0 + whole) == pytest.approx(0, abs=1e-5 * there.error)
        assert there.error / 2 > 1e-5


def test_effects_of_a_small_change_are_its_kl():
    """To second order: drawn tokens approximate the form, int8 rows change little."""
    model = tiny("Llama")
    plan = PDPlan.dense(make_plan().model)
    sends = (KVSend(), KVSend(wire_dtype="int8"))
    problem = Problem(PDOracle(model, model, plan), text(4, 32), PROMPT)
    measure = JointMeasure(problem, block_choices(sends, ("keep",), ("keep",)), lambda _: None, draws=300)
    effects = measure.about(DENSE)
    quadratic = FeatureQuadratic(effects.error, effects.linear, effects.gram, measure.parts)
    small = tuple(BlockChoice(send=sends[1]) for _ in range(BLOCKS))
    assert quadratic.harm(np.ones(BLOCKS, dtype=int)) == pytest.approx(measure.divergence(small), rel=0.3)


def test_about_a_context_a_second_change_is_measured_behind_the_first():
    """From a context, the harm of one more change is exactly that of both; from the unpruned pair it is a sum."""
    measure = make_measure(draws=3, batch=3)
    options = list(measure.options)
    steps = [DENSE]
    steps.append(changed(steps[-1], b1=BlockChoice("skip", "keep")))
    steps.append(changed(steps[-1], b3=BlockChoice("keep", "drop")))
    steps.append(changed(steps[-1], b2=BlockChoice("without_mlp", "keep")))
    for context, choices in pairwise(steps):
        effects = measure.about(context)
        model = FeatureQuadratic(effects.error, effects.linear, effects.gram, measure.parts)
        at = np.array([options.index(choice) for choice in choices])
        assert model.harm(at) == pytest.approx(measure.about(choices).error / 2, rel=1e-4)
