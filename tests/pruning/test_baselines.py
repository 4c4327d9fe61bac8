"""What methods choose that measure no loss, judged beside the finalists of a search that does."""

import pytest
import torch
from searches import stages_of
from tinypd import BLOCKS, make_plan, text, tiny

from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.finalists import FinalRound, judge_finalists
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.search import Problem, Trajectory, get_search
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.recipe.pruning_methods import METHODS, ONE_SHOT

BASELINES = {name: get_search(name) for name in ONE_SHOT}


def quiet(_):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


def problem_of(model, forced=(), **more):
    ids, before = text(6, 30), Solution.of(forced)
    return Problem(model, ids, NextTokenLoss(model, ids, 0, before), 2 + len(forced), before, **more)


@pytest.mark.parametrize("forced", [(), (1,)])
@pytest.mark.parametrize("favourite", ONE_SHOT)
def test_their_choices_are_judged_and_may_win(model, favourite, forced):
    problem, lines = problem_of(model, forced), list[str]()
    chosen = {name: search.run(problem, quiet).solution for name, search in BASELINES.items()}
    result = Greedy().run(problem, quiet)

    def judge(stage, prefill, solutions):
        assert {*chosen.values()} <= {*solutions}
        assert solutions[0] == result.solution
        return [float(solution != chosen[favourite]) for solution in solutions]

    final_round = FinalRound(judge, 1, BASELINES)
    ranked, cost = judge_finalists("prefill", problem, result, final_round, Trajectory(), lines.append)
    assert ranked[0].solution == chosen[favourite]
    assert [line for line in lines if line == f"{favourite} would remove {chosen[favourite].label}"]
    assert cost.block_forwards >= 2 * BLOCKS * len(problem.ids), "each runs the dense model once"


def test_without_them_nobody_else_is_judged(model):
    problem = problem_of(model)
    unasked = FinalRound(lambda *_: pytest.fail("judged"), 1)
    assert judge_finalists("prefill", problem, Greedy().run(problem, quiet), unasked, Trajectory(), quiet)[0] == ()


def test_a_method_that_has_no_answer_here_is_passed_over(model):
    """No two adjacent blocks may go."""
    problem, lines = problem_of(model, protected=frozenset({1, 3})), list[str]()
    result = Greedy().run(problem, quiet)
    everybody = FinalRound(lambda *a: [0.0] * len(a[2]), 1, {"streamline": get_search("streamline")})
    assert judge_finalists("prefill", problem, result, everybody, Trajectory(), lines.append)[0] == ()
    assert any(line.startswith("streamline: no 2 adjacent blocks may go") for line in lines)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_same_refit(model, method):
    """The refit of what a method chose is that of these blocks, changes each stage, and its judge sees it.

    Not that it helps: on so little text of a random model it does not.
    """
    ids = text(8, 40)
    choice = stages_of(model, ids, 1, 2, method=method)
    plan = make_plan(choice.prefill.removed, choice.decode.removed)
    pair = StagePair(model, plan)
    for stage in STAGES:
        pair = get_compensation("least-squares").compensate(pair, stage, ids, quiet)
        assert pair.changed[stage], f"{stage} is refitted"
    again = RefitJudge(model, plan.model, ids, "least-squares")
    (loss,) = again("decode", choice.prefill.solution, [choice.decode.solution])
    (plain,) = RefitJudge(model, plan.model, ids, "none")("decode", choice.prefill.solution, [choice.decode.solution])
    assert loss != plain
    assert torch.isfinite(torch.tensor(loss))
