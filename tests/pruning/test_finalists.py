"""Finalists: who they are, and that the judge has the last word."""

from dataclasses import replace

import pytest
import torch
from searches import spent, stages_of
from tinypd import BLOCKS, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.compensation.held_out import held_out
from pdtrim_deploy.pruning.finalists import FinalRound, judge_finalists
from pdtrim_deploy.pruning.judging_cost import judged_forwards
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss, prefill_loss
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.search import Problem, Settings, Trajectory
from pdtrim_deploy.pruning.search.anneal import Anneal
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import StageSearch


def quiet(_):
    pass


class Students:
    """Block i with its MLP output made so many times as large."""

    def __init__(self, model, times):
        self.model, self.times = model, times

    def tensors(self, pair):
        name = "mlp.down_proj.weight"
        return {name: self.times * self.model.model.layers[pair[0]].get_parameter(name).detach()}


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


def whole_loss(model, ids, removed):
    return prefill_loss(StagePair(model, make_plan(removed, removed)), ids)


def test_annealing_names_where_it_began_and_what_it_took(model):
    ids = text(6, 30)
    problem = Problem(model, ids, NextTokenLoss(model, ids), 2)
    result = Anneal(Settings(seed=3, steps=30)).run(problem, quiet)
    assert result.others[0] == Greedy(2.0).run(problem, quiet).solution
    assert result.solution in result.others
    losses = [whole_loss(model, ids, solution.removed) for solution in result.others[1:]]
    assert losses == pytest.approx(sorted(losses), abs=1e-5)


@pytest.mark.parametrize("favourite", range(3))
def test_the_judge_has_the_last_word(model, favourite):
    ids, calls = text(6, 30), []

    def judge(stage, prefill, solutions):
        calls.append((stage, prefill, solutions))
        return [float(at != min(favourite, len(solutions) - 1)) for at in range(len(solutions))]

    problem = Problem(model, ids, NextTokenLoss(model, ids), 2)
    before = Anneal(Settings(seed=3, steps=30)).run(problem, quiet)
    ranked, cost = judge_finalists("prefill", problem, before, FinalRound(judge, 3), Trajectory(), quiet)
    search = StageSearch(NOTHING, before, ranked, before.cost + cost)
    chosen = search.choice(search.best)
    ((_, _, solutions),) = calls
    assert len(solutions) == len(set(solutions)) <= 3
    assert solutions[0] == before.solution
    best = solutions[min(favourite, len(solutions) - 1)]
    assert chosen.solution == ranked[0].solution == best
    assert chosen.loss == pytest.approx(whole_loss(model, ids, best.removed), abs=1e-5)
    assert chosen.cost.block_forwards > before.cost.block_forwards
    assert [step.block for step in chosen.steps] == list(chosen.removed)
    assert chosen.steps[-1].loss == pytest.approx(chosen.loss, abs=1e-5)


def test_the_best_run_of_adjacent_blocks_is_among_them(model):
    ids = text(1, 60)  # one part of text: every run is measured on all of it
    problem = Problem(model, ids, NextTokenLoss(model, ids, 0, Solution.of((2,))), 3, Solution.of((2,)))
    runs = [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    best = min(runs, key=lambda run: whole_loss(model, ids, run))
    result = replace(Greedy().run(problem, quiet), removed=(2, 0, 4))
    everybody = FinalRound(lambda *a: [0.0] * len(a[2]), 9)
    ranked, _ = judge_finalists("prefill", problem, result, everybody, Trajectory(), quiet)
    assert {finalist.solution for finalist in ranked} == {result.solution, Solution.of(best)}


def test_a_verdict_that_is_no_number_is_refused(model):
    ids = text(6, 30)
    problem = Problem(model, ids, NextTokenLoss(model, ids), 2)
    result = replace(Greedy().run(problem, quiet), others=(Solution.of((0, 3)),))
    nobody = FinalRound(lambda *a: [float("nan")] * len(a[2]), 3)
    with pytest.raises(UserError, match="finalist's loss is not a number"):
        judge_finalists("prefill", problem, result, nobody, Trajectory(), quiet)


def test_one_alone_is_not_judged(model):
    ids = text(6, 30)
    problem = Problem(model, ids, NextTokenLoss(model, ids), 1)
    before = Greedy(None).run(problem, quiet)
    unasked = FinalRound(lambda *_: pytest.fail("judged"), 3)
    assert judge_finalists("prefill", problem, before, unasked, Trajectory(), quiet)[0] == ()


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_each_half_is_judged_by_what_the_other_fitted(model, stage):
    ids, gone = text(6, 30), Solution.of((1, 3))
    shape = make_plan().model
    prefill = Solution.of((1,))
    (judged,) = RefitJudge(model, shape, ids, "least-squares")(stage, prefill, [gone])
    mend, total = get_compensation("least-squares").compensate, 0.0
    for fitted, checked in ((ids[:3], ids[3:]), (ids[3:], ids[:3])):
        pair = StagePair(model, make_plan(gone.removed if stage == "prefill" else prefill.removed, gone.removed))
        pair = mend(pair, "prefill", fitted, quiet)
        if stage == "decode":
            pair = mend(pair, "decode", fitted, quiet)
        total += (prefill_loss if stage == "prefill" else pd_loss)(pair, checked) / 2
    assert judged == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("gone", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (2, 4), (3, 4)])
def test_rescaling_that_does_not_help_is_judged_as_left_out(model, gone):
    """As a build leaves it out: of each stage apart, prefill first."""
    ids, norm, blocks = text(6, 30), get_compensation("norm"), Solution.of(gone)
    shape, prefill = make_plan().model, Solution.of(gone[:1])
    judge = RefitJudge(model, shape, ids, "norm")
    check = held_out(norm, StagePair(model, make_plan(gone, gone)), "prefill", ids)
    assert list(judge("prefill", NOTHING, [blocks])) == pytest.approx([min(check.before, check.after)], abs=1e-5)
    first = held_out(norm, StagePair(model, make_plan(gone[:1], gone[:1])), "prefill", ids).kept
    total = {True: 0.0, False: 0.0}
    for fitted, checked in ((ids[:3], ids[3:]), (ids[3:], ids[:3])):
        pair = StagePair(model, make_plan(gone[:1], gone))
        pair = norm.compensate(pair, "prefill", fitted, quiet) if first else pair
        for kept in total:
            total[kept] += pd_loss(norm.compensate(pair, "decode", fitted, quiet) if kept else pair, checked) / 2
    assert list(judge("decode", prefill, [blocks])) == pytest.approx([min(total.values())], abs=1e-5)


@pytest.mark.parametrize("method", ["least-squares", "norm"])
@pytest.mark.parametrize("together", [None, 1])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_block_forwards_are_no_more_than_is_said(model, stage, together, method, monkeypatch):
    ids, ran, block = text(8, 30), [], Blockwise.block
    prefill, solutions = Solution.of((1,)), [Solution.of((1, 3)), Solution.of((0, 1)), Solution.of((1, 2))]
    if stage == "prefill":
        solutions = [Solution.of((b,)) for b in (1, 2, 3)]
    monkeypatch.setattr(Blockwise, "block", lambda self, *a: (ran.append(len(a[1])), block(self, *a))[1])
    list(RefitJudge(model, make_plan().model, ids, method, together=together)(stage, prefill, solutions))
    judged = (3, 0) if stage == "prefill" else (0, 3)
    most = judged_forwards(BLOCKS, 1, 2, len(ids), *judged, together=together is None, twice=method == "norm")
    assert 0.7 * most < sum(ran) <= most


@pytest.mark.parametrize("method", ["least-squares", "norm"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_one_by_one_is_the_same_and_each_is_said_before_the_next(model, stage, method):
    ids, shape, solutions = text(6, 30), make_plan().model, [Solution.of((b, 3)) for b in (1, 2)]
    prefill, notes = Solution.of((3,)), []
    both = list(RefitJudge(model, shape, ids, method)(stage, prefill, solutions))
    alone = RefitJudge(model, shape, ids, method, note=notes.append, together=1)(stage, prefill, solutions)
    shared = "prefill: " if stage == "decode" else None  # fitted once, for all of decode's

    def heard():
        return len([note for note in notes if shared is None or not note.startswith(shared)])

    first, looked_at = next(alone), heard()
    assert [first, *alone] == pytest.approx(both, abs=1e-5)
    assert heard() == 2 * looked_at > 0


def test_a_search_that_was_finished_is_not_evaluated_again(model, tmp_path, monkeypatch):
    ids, ran, block, judged_stages = text(4, 30, seed=1), [], Blockwise.block, []

    def judge(stage, prefill, solutions):
        judged_stages.append(stage)
        return [float(at) for at in range(len(solutions))]

    def chosen(finalists=4):
        more = {"settings": Settings(0, 20), "judge": judge, "finalists": finalists, "folder": tmp_path}
        return stages_of(model, ids, 1, 3, method="anneal", **more)

    first = chosen()
    monkeypatch.setattr(Blockwise, "block", lambda self, *a: (ran.append(len(a[1])), block(self, *a))[1])
    again = chosen()
    assert not ran, "all is read"
    assert (again.prefill.removed, again.decode.removed) == (first.prefill.removed, first.decode.removed)
    for stage in ("prefill", "decode"):
        assert getattr(again, stage).finalists == getattr(first, stage).finalists
    assert spent(first.prefill, first.decode) == spent(again.prefill, again.decode)
    once = judged_stages[: len(judged_stages) // 2]
    assert once == judged_stages[len(once) :] != [], "a judge keeps its own word (`verdicts`)"
    chosen(3)
    assert ran, "so many finalists are another question"


def test_students_stand_for_pairs(model):
    ids, shape, pair = text(4, 30), make_plan().model, Solution.of((), (2,))
    losses = [list(RefitJudge(model, shape, ids, "norm", Students(model, n))("decode", pair, [pair])) for n in (2, 4)]
    assert losses[0] != losses[1]


def test_stages_stay_nested_whatever_the_judge_likes(model):
    torch.manual_seed(0)
    ids = text(4, 30, seed=1)
    removals = stages_of(
        model, ids, 1, 3, method="anneal", settings=Settings(0, 20), finalists=5,
        judge=lambda stage, prefill, solutions: [-float(at) for at in range(len(solutions))],
    )  # fmt: skip
    assert removals.prefill.solution.within(removals.decode.solution)
    assert removals.decode.finalists
    assert removals.decode.removed[:1] == removals.prefill.removed
    assert len(removals.decode.removed) == 3 < BLOCKS


def prefers_another(decode):
    """A judge that likes what greedy found for prefill least, and of decode what `decode` says."""

    def judge(stage, prefill, solutions):
        return [-float(at) if stage == "prefill" else decode(prefill, lost) for at, lost in enumerate(solutions)]

    return judge


@pytest.mark.parametrize("method", ["greedy", "anneal"])
@pytest.mark.parametrize("begun", [False, True])
def test_decode_has_a_say_in_what_prefill_loses(model, method, begun, tmp_path):
    ids, settings = text(6, 30), Settings(3, 20)
    start = stages_of(model, ids, 2, 4).prefill.solution

    def judge(prefill, _):
        return float((prefill == start) != begun)

    lines = []

    def chosen(likes, folder=None):
        more = {"folder": folder, "progress": lines.append}
        return stages_of(model, ids, 2, 4, method=method, settings=settings, judge=likes, finalists=4, **more)

    removals = chosen(prefers_another(judge), tmp_path)
    assert (removals.prefill.solution == start) == begun
    assert removals.prefill.solution.within(removals.decode.solution)
    assert removals.decode.removed[: len(removals.prefill.removed)] == removals.prefill.removed
    decode_losses = removals.decode_losses
    assert set(decode_losses) <= {finalist.solution for finalist in removals.prefill.finalists}
    assert len(decode_losses) == 2
    assert min(decode_losses, key=decode_losses.get) == removals.prefill.solution
    assert removals.prefill.loss == pytest.approx(whole_loss(model, ids, removals.prefill.removed), abs=1e-5)
    searches = ("search-prefill", "search-decode", "search-decode-again")
    files = [f"{name}{which}.jsonl" for name in searches for which in ("", "-finalists")]
    rows = [(tmp_path / name).read_text() for name in files]
    assert {p.name for p in tmp_path.iterdir()} == set(files)
    first = stages_of(model, ids, 2, 4, method=method, settings=settings, judge=prefers_another(lambda *_: 0.0),
                          finalists=4)  # fmt: skip
    assert first.prefill.solution != start, "ties go to what prefill likes better"
    assert spent(removals.decode) == spent(first.decode), "both searches are paid for, whichever is taken"
    again = chosen(prefers_another(judge), tmp_path)
    assert again.decode.solution == removals.decode.solution
    assert [(tmp_path / name).read_text() for name in files] == rows, "made once"


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_no_worse_than_greedy_in_the_judges_eyes(model, seed):
    ids = text(8, 30, seed=seed)
    judge = RefitJudge(model, make_plan().model, ids, "least-squares")
    greedy = Greedy(2.0)  # where annealing begins
    plain = stages_of(model, ids, 2, 4, method=greedy)
    annealed = stages_of(model, ids, 2, 4, method="anneal", settings=Settings(seed, 15), judge=judge, finalists=4)
    best, bound = (next(judge("decode", run.prefill.solution, [run.decode.solution])) for run in (annealed, plain))
    assert best <= bound + 1e-6
