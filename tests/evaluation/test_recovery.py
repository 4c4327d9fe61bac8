"""Recovery: ratios of scores and of perplexities, their paired errors, and gates."""

import math
from statistics import stdev

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.recovery import Recovery, leading
from pdtrim_deploy.evaluation.tasks import TASKS
from pdtrim_deploy.recipe import gates

GROUPS = ("all",) * 4
DENSE = Measured("gsm8k", GROUPS, {"right": (1.0, 1.0, 1.0, 0.0)})
PD = Measured("gsm8k", GROUPS, {"right": (1.0, 0.0, 0.0, 1.0)})


def of_scores(dense, pd, **gate):
    return Recovery.of(Measured("t", GROUPS, {"acc": dense}), Measured("t", GROUPS, {"acc": pd}), gate)


def test_of_scores_it_is_the_ratio_of_means_and_its_error_is_that_of_the_pairs():
    row = of_scores((1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0))
    assert (row.dense, row.score, row.recovery) == (1.0, 0.5, 0.5)
    assert row.stderr == pytest.approx(stdev((1, 0, 1, 0)) / 2)
    assert of_scores((1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0)).stderr == 0  # paired: equal answers leave no error
    more = Recovery.of(DENSE, PD, {})
    moved = [(b - 2 / 3 * a) / 0.75 for a, b in zip(DENSE.values["right"], PD.values["right"], strict=True)]
    assert (more.recovery, more.stderr) == (pytest.approx(2 / 3), pytest.approx(stdev(moved) / 2))


def test_of_losses_it_is_the_ratio_of_perplexities():
    dense, pd = (Measured("perplexity", GROUPS, {"nll": values}) for values in ((1.0,) * 4, (1.1, 1.2, 1.1, 1.2)))
    row = Recovery.of(dense, pd, {"perplexity": 1.17})
    assert (row.dense, row.score) == (math.e, pytest.approx(math.exp(1.15)))
    assert row.recovery == pytest.approx(math.exp(0.15))
    assert row.stderr == pytest.approx(math.exp(0.15) * stdev((0.1, 0.2, 0.1, 0.2)) / 2)
    assert row.passed
    assert not Recovery.of(dense, pd, {"perplexity": 1.15}).passed


def test_a_gate_is_kept_at_its_bound_and_above():
    dense, pd = (1.0,) * 4, (1.0, 1.0, 1.0, 0.0)
    assert [of_scores(dense, pd, t=gate).passed for gate in (0.7, 0.75, 0.76)] == [True, True, False]
    assert of_scores(dense, pd).passed is None
    assert "gate at least 0.76: FAILED" in of_scores(dense, pd, t=0.76).sentence()


def test_where_dense_scores_nothing_no_gate_is_kept():
    row = of_scores((0.0,) * 4, (1.0,) * 4, t=0.9)
    assert (row.recovery, row.stderr, row.passed) == (None, None, False)
    assert row.sentence() == "t: no recovery of acc, the dense model scores 0, gate at least 0.9: FAILED"


def test_of_a_measure_of_which_less_is_better_a_gate_is_the_most():
    dense, pd = (Measured("t", GROUPS, {"ter": (x,) * 4}, higher_is_better={"ter": False}) for x in (0.5, 0.6))
    row = Recovery.of(dense, pd, {"t": 1.1})
    assert (row.recovery, row.passed, Recovery.of(dense, pd, {"t": 1.3}).passed) == (pytest.approx(1.2), False, True)
    assert "gate at most 1.1: FAILED" in row.sentence()


def test_a_gate_needs_a_direction():
    dense = Measured("t", GROUPS, {"ter": (0.5,) * 4})
    assert Recovery.of(dense, dense, {}).higher_is_better is None
    with pytest.raises(UserError, match="a gate for t, and whether more or less of ter is better is unknown"):
        Recovery.of(dense, dense, {"t": 0.9})


def test_a_single_question_has_no_error():
    one_text = [Measured("t", ("all",), {"nll": (value,)}) for value in (1.0, 1.1)]
    assert Recovery.of(*one_text, {}).stderr is None


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        (("accuracy", "accuracy_norm"), "accuracy"),
        (("acc", "acc_norm"), "acc_norm"),
        (("exact_match,strict-match", "exact_match,flexible-extract"), "exact_match,strict-match"),
        (("bleu", "ter"), "bleu"),
        (("nll", "acc"), "acc"),
    ],
)
def test_a_measure_stands_for_its_task(measures, expected):
    assert leading(Measured("t", ("all",), dict.fromkeys(measures, (1.0,)))) == expected


def test_a_recipe_knows_the_tasks_of_a_bundle():
    assert {*TASKS, *gates.SERVED_TASKS} == set(gates.TASKS)
