import itertools

import pytest
import torch
from searches import BASELINES, search_of, stages_of
from tinypd import BLOCKS, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.redundancy import redundancy
from pdtrim_deploy.pruning.search import Problem, Settings, get_search
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.racing import surely_above
from pdtrim_deploy.pruning.search.trajectory import Trajectory
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.pruning_methods import METHODS


def quiet(_):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def ids(model):
    """Text the model itself likes, so that blocks matter unequally."""
    torch.manual_seed(1)
    out = torch.randint(0, 97, (6, 1))
    with torch.no_grad():
        for _ in range(40):
            step = torch.distributions.Categorical(logits=model(out).logits[:, -1])
            out = torch.cat((out, step.sample()[:, None]), dim=1)
    return out


def problem(model, ids, remove, split=0, **more):
    forced = more["forced"] = Solution.of(more.get("forced", ()))
    return Problem(model, ids, NextTokenLoss(model, ids, split, forced), remove, **more)


def pd_loss(model, ids, split, prefill, decode):
    oracle = make_oracle(model, make_plan(prefill, decode))
    return -float(oracle.score(oracle.prefill(ids[:, :split]), ids[:, split:])[:, 1:].mean())


def test_exact_greedy_takes_the_best_of_each_round(model, ids):
    result = Greedy(race_z=None).run(problem(model, ids, 3, split=10), quiet)
    for step, (gone, block) in enumerate(
        zip(((), result.removed[:1], result.removed[:2]), result.removed, strict=True)
    ):
        losses = {b: pd_loss(model, ids, 10, (), (*gone, b)) for b in range(BLOCKS) if b not in gone}
        assert block == min(losses, key=losses.__getitem__)
        row = result.trajectory[step]
        assert (row.step, row.block, row.loss) == (step + 1, block, pytest.approx(losses[block], abs=1e-4))
    costs = [row.block_forwards for row in result.trajectory]
    assert costs == sorted(costs)
    naive = 6 * sum(k * (k - 1) for k in (5, 4, 3))
    assert costs[-1] < 0.75 * naive


@pytest.mark.parametrize("search", [Greedy(race_z=None), Greedy(3.0)], ids=repr)
def test_of_blocks_that_cost_the_same_the_earlier_goes(search, ids, monkeypatch):
    """Even where the last bits of a sum say otherwise, as on another device."""
    idle = tiny("Llama")
    for layer in (1, 3):
        block = idle.model.layers[layer]
        for output in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(output.weight)
    either = problem(idle, ids, 1, split=10, protected=frozenset(range(BLOCKS)) - {1, 3})
    evaluate = either.evaluator.evaluate

    def shaken(solutions, batch):
        fresh = zip(solutions, evaluate(solutions, batch), strict=True)
        return [losses * (1 + 1e-7) if solution.removed == (1,) else losses for solution, losses in fresh]

    monkeypatch.setattr(either.evaluator, "evaluate", shaken)
    assert search.run(either, quiet).removed == (1,)


def test_racing_agrees_and_runs_less(model, ids):
    many = ids.repeat(3, 1).roll(1, 0)
    exact, raced = (Greedy(z).run(problem(model, many, 2), quiet) for z in (None, 3.0))
    assert raced.removed == exact.removed
    assert raced.trajectory[-1].loss == pytest.approx(exact.trajectory[-1].loss, abs=1e-5)
    assert raced.trajectory[-1].block_forwards < exact.trajectory[-1].block_forwards


@pytest.mark.parametrize("name", ["greedy", "anneal"])
def test_racing_may_be_turned_off(name):
    searches = [get_search(name, Settings(racing=racing)) for racing in (True, False)]
    assert searches[0].race_z is not None
    assert searches[1].race_z is None
    assert repr(searches[0]) != repr(searches[1])  # of which a search's log is
    recipes = [PruningSection(method=name, decode_blocks=2, racing=racing) for racing in (True, False)]
    assert "racing" not in recipes[0].model_dump()  # such recipes keep their digests
    assert recipes[1].model_dump()["racing"] is False


def test_racing_keeps_what_noise_could_explain():
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert not surely_above(noise, 0, 3)
    assert not surely_above(noise - 1, 0, 3)
    assert surely_above(noise + 1, 0, 3)
    assert not surely_above(noise + 1, 1, 3)
    assert not surely_above((noise + 1)[:3], 0, 3)  # 6 units of 32 tokens: too few to say
    assert not surely_above(noise + 1, 0, None)


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_every_method_honours_forced_and_protected(model, ids, name):
    search = search_of(name)
    result = search.run(problem(model, ids, 3, forced=(4,), protected=frozenset({0, 1})), quiet)
    assert result.removed[0] == 4
    assert set(result.removed[1:]) == {2, 3}
    assert [row.block for row in result.trajectory] == list(result.removed[1:])
    assert search.run(problem(model, ids, 1, forced=(4,)), quiet).removed == (4,)
    assert search.run(problem(model, ids, 2), quiet).removed == search.run(problem(model, ids, 2), quiet).removed


def test_cosine_takes_the_most_redundant(model, ids):
    order = redundancy(model, ids).argsort(descending=True).tolist()
    assert get_search("cosine").run(problem(model, ids, 4), quiet).removed == tuple(order[:4])


@pytest.mark.parametrize("method", [*METHODS, *BASELINES])
def test_stages_are_nested(model, ids, method):
    for prefill, decode in itertools.combinations_with_replacement(range(4), 2):
        stages = stages_of(model, ids, prefill, decode, method=method)
        assert len(stages.prefill.removed) == prefill
        assert len(stages.decode.removed) == len(set(stages.decode.removed)) == decode
        assert stages.decode.removed[:prefill] == stages.prefill.removed
        assert len(stages.decode.steps) == decode - prefill


def test_decode_is_judged_behind_the_pruned_prefill(model, ids):
    stages = stages_of(model, ids, 1, 2, prompt_tokens=12)
    assert (
        stages.decode.loss
        == stages.decode.steps[-1].loss
        == pytest.approx(pd_loss(model, ids, 12, stages.prefill.removed, stages.decode.removed), abs=1e-4)
    )


def test_candidates_say_which_block_they_are_in(model, ids):
    """A look of a large model takes minutes: each block that runs is one step of it."""
    lines = []
    choose_stages(SearchInputs(model, ids, Greedy(race_z=None)), 1, 1, progress=lines.append)
    places = [line.rpartition(" ")[2] for line in lines if "candidates, block " in line]
    assert places[:BLOCKS] == [f"{block}/{BLOCKS}" for block in range(1, BLOCKS + 1)]
    assert all(line.startswith("prefill: ") for line in lines)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((2, 1), "prefill_blocks is 2 but decode_blocks is 1"),
        ((0, BLOCKS), "cannot remove 5 of 5 blocks; remove at most 4"),
        ((1, 99), "cannot remove 99 of 5 blocks; remove at most 4"),
    ],
)
def test_impossible_counts_are_refused(model, ids, counts, message):
    with pytest.raises(UserError, match=message):
        stages_of(model, ids, *counts)


def test_other_bad_input_is_refused(model, ids):
    with pytest.raises(UserError, match="pruning method 'best' is unknown; use one of anneal, cosine, greedy"):
        stages_of(model, ids, 0, 1, method="best")
    with pytest.raises(UserError, match="cannot remove 3 of 5 blocks with 3 protected; remove at most 2"):
        stages_of(model, ids, 0, 3, protected=frozenset({0, 1, 4}))
    broken = tiny("Llama")
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="loss is not a number"):
        stages_of(broken, text(2, 12), 0, 1)


def test_no_recipe_names_a_baseline():
    assert not set(METHODS) & set(BASELINES)
    assert all(repr(search_of(name)) == repr(search_of(name)) for name in [*METHODS, *BASELINES]), "logs go by it"


def test_perplexity_takes_those_that_cost_least_alone_and_goes_on_where_it_stopped(model, ids, tmp_path):
    def run(log):
        search_problem = problem(model, ids, 2, split=10, trajectory=log)
        return search_of("perplexity").run(search_problem, quiet), search_problem.evaluator.batches

    file = tmp_path / "search.jsonl"
    result, batches = run(Trajectory(file, 1))
    alone = {b: pd_loss(model, ids, 10, (), (b,)) for b in range(BLOCKS)}
    assert list(result.removed) == sorted(alone, key=alone.get)[:2]
    rows = file.read_text().splitlines()
    assert len(rows) == 1 + batches >= 3
    file.write_text("\n".join(rows[:-1]) + "\n")
    stopped = Trajectory(file, 1)
    assert run(stopped)[0].removed == result.removed
    assert file.read_text().splitlines()[:-1] == rows[:-1]
