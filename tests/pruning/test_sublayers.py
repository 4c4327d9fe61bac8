"""Searches over sublayers: what they may take, that they take what costs least, and that they go on."""

import json
import random

import pytest
import tinypd
import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, Drop, Keep, PDPlan, WithoutAttention, WithoutMLP
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.evaluator import InProcess, mean_loss
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss
from pdtrim_deploy.pruning.search import Problem, Settings, Trajectory
from pdtrim_deploy.pruning.search.anneal import Anneal
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.moves import Moves
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.pruning.units import Counts, block_of, kind_of, name_of, unit_of

BLOCKS = tinypd.BLOCKS
IDS = tinypd.text(4, 24)


def quiet(_):
    pass


def problem_of(counts, forced=NOTHING, trajectory=None, prompt=12, model=None, objective=None):
    model = model or tinypd.tiny("Llama")
    objective = objective or NextTokenLoss(model, IDS, prompt, forced)
    more = {} if trajectory is None else {"trajectory": trajectory}
    return Problem(model, IDS, objective, counts.blocks, forced, sublayers=counts._replace(blocks=0), **more)


def test_units_are_named_and_counted():
    assert [kind_of(unit) for unit in (5, 1005, 2005)] == ["block", "attention", "mlp"]
    assert {block_of(unit) for unit in (5, 1005, 2005)} == {5}
    assert unit_of("mlp", 7) == 2007
    assert name_of(1003) == "attention 3"
    assert Counts.of_units([1, 1002, 1003, 2004]) == Counts(1, 1, 2)
    assert str(Counts(2, 1, 1)) == "2 blocks, 1 MLP, 1 attention"


def test_a_solution_of_sublayers_reads_as_it_is_written():
    lost = Solution.of([1, 1004, 2003])
    assert lost.actions(5) == (Keep(), Drop(), Keep(), WithoutMLP(), WithoutAttention())
    assert lost.route(5) == ((0,), (2,), (3, 2003), (4, 1004))
    assert lost.touched == {1, 3, 4}
    report = json.loads(json.dumps({"removed": lost.blocks, "pairs": lost.pairs, **lost.report}))
    assert report == {"removed": [1], "pairs": [], "attentions": [4], "mlps": [3]}
    assert Solution.parse(report) == Solution.read(str(lost)) == lost
    assert Solution.of([1]).report == {}
    with pytest.raises(ValueError, match="overlap"):
        Solution.of([4, 1004])


def test_the_loss_of_a_solution_is_that_of_the_pair_in_the_oracle():
    """Prefill lost block 1, and 3's attention; decode loses more, and its KV is that of this prefill."""
    model, prefill, decode = tinypd.tiny("Llama"), Solution.of([1, 1003]), Solution.of([1, 1003, 2002])
    searched = mean_loss(InProcess(NextTokenLoss(model, IDS, 12, prefill)), decode)
    plan = PDPlan.uncut(tinypd.make_plan().model, prefill.actions(BLOCKS), decode.actions(BLOCKS))
    pair = StagePair(model, plan)
    oracle = PDOracle(*(pair.stage(stage) for stage in STAGES), plan)
    scores = oracle.score(oracle.prefill(IDS[:, :12]), IDS[:, 12:])
    assert searched == pytest.approx(-float(scores[:, 1:].double().mean()), abs=1e-5)  # the first token is prefill's
    assert pd_loss(pair, IDS) == pytest.approx(-float(scores.double().mean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_greedy_takes_the_sublayer_that_costs_least(kind):
    counts = Counts(attentions=1) if kind == "attention" else Counts(mlps=1)
    problem = problem_of(counts)
    losses = {
        unit_of(kind, block): mean_loss(problem.evaluator, Solution.of([unit_of(kind, block)]))
        for block in range(BLOCKS)
    }
    result = Greedy(race_z=None).run(problem, quiet)
    assert result.removed == (min(losses, key=losses.get),)
    assert result.loss == pytest.approx(min(losses.values()))


def test_blocks_go_before_sublayers_and_no_block_gives_two():
    problem = problem_of(Counts(1, 1, 2))
    result = Greedy(race_z=None).run(problem, quiet)
    assert [kind_of(unit) for unit in result.removed] == ["block", "mlp", "attention", "attention"]
    assert len({block_of(unit) for unit in result.removed}) == 4


def test_annealing_swaps_within_a_kind_and_improves_on_greedy(tmp_path):
    counts, log = Counts(1, 1, 1), tmp_path / "log.jsonl"
    start = Greedy(2.0).run(problem_of(counts), quiet)
    search = Anneal(Settings(steps=25))
    result = search.run(problem_of(counts, trajectory=Trajectory(log, "x")), quiet)
    assert Counts.of_units(result.solution.removed) == counts
    assert result.loss <= start.loss
    assert all(Counts.of_units(other.removed) == counts for other in result.others)
    again = search.run(problem_of(counts, trajectory=Trajectory(log, "x")), quiet)  # all read, nothing run
    assert again.solution == result.solution


def test_moves_leave_forced_sublayers_alone():
    forced = Solution.of([1001, 2])
    problem = problem_of(Counts(2, 1, 2), forced)
    moves, solution = Moves(problem), Solution.of([0, 2, 1001, 1003, 2004])
    for step in range(40):
        _, solution = moves.draw(random.Random(step), solution, set())
        assert forced.within(solution)
        assert solution.counts == Counts(2, 1, 2)


def test_decode_goes_without_all_that_prefill_goes_without():
    inputs = SearchInputs(tinypd.tiny("Llama"), IDS, Greedy(race_z=None))
    removals = choose_stages(inputs, Counts(0, 1, 1), Counts(1, 1, 2), 12)
    prefill, decode = removals.prefill.solution, removals.decode.solution
    assert (prefill.counts, decode.counts) == (Counts(0, 1, 1), Counts(1, 1, 2))
    assert prefill.within(decode)
    plan = PDPlan.uncut(tinypd.make_plan().model, prefill.actions(BLOCKS), decode.actions(BLOCKS))
    assert len(plan.kv) == 2


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((Counts(0, 0, 2), Counts(0, 0, 1)), "prefill_attentions is 2 but decode_attentions is 1"),
        (
            (Counts(), Counts(2, 2, 2)),
            "cannot remove 2 blocks, 2 MLPs, 2 attentions more where 5 of 5 blocks",
        ),
    ],
)
def test_what_cannot_be_is_refused(counts, sentence):
    inputs = SearchInputs(tinypd.tiny("Llama"), IDS, Greedy(race_z=None))
    with pytest.raises(UserError, match=sentence):
        choose_stages(inputs, *counts, 12)


@pytest.mark.parametrize("stage", STAGES)
def test_least_squares_make_up_for_a_lost_attention(stage):
    """The block's own down_proj is refitted, and those behind; a block without MLP has none."""
    torch.manual_seed(0)
    model, lost = tinypd.tiny("Llama"), Solution.of([1001, 2003])
    plan = PDPlan.uncut(
        tinypd.make_plan().model, (lost if stage == "prefill" else NOTHING).actions(BLOCKS), lost.actions(BLOCKS)
    )
    pair, ids = StagePair(model, plan), tinypd.text(16, 48, seed=3)
    refitted = get_compensation("least-squares").compensate(pair, stage, ids, quiet)
    changed = refitted.changed[stage]
    assert 1 in changed
    assert 3 not in changed
    assert 4 in changed, "what is behind the lost MLP makes up for it"
    error = [hidden_error(each, stage, ids) for each in (pair, refitted)]
    assert error[1] < 0.9 * error[0]


@torch.no_grad()
def hidden_error(pair, stage, ids):
    """Squared distance of the stage's last hidden states from the dense model's, on text it was fitted to."""
    oracle = PDOracle(*(pair.stage(name) for name in STAGES), pair.plan)
    dense = pair.model.model(ids, use_cache=False).last_hidden_state
    if stage == "prefill":
        got = oracle.prefill_model.model(ids, use_cache=False).last_hidden_state
        return float((got - dense).square().sum())
    hidden = oracle.extend(ids[:, 24:], 24, oracle.hand_over(oracle.prefill(ids[:, :24])))
    return float((oracle.decode.normed(hidden) - dense[:, 24:]).square().sum())
