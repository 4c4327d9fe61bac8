"""What a race looks at, on losses made up: every block adds its own to each token's, and noise that all share."""

import itertools
import math

import pytest
import torch

from pdtrim_deploy.pruning.search import Problem, Trajectory
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.race import FEW, Losses, Race
from pdtrim_deploy.pruning.solution import Solution

BLOCKS, SIZES, SCORED = 16, (2, 2, 4, 8), 128


class Additive:
    """An objective and evaluator in one; `looks` are (blocks that went last, batch)."""

    workers, blocks, batches = 1, BLOCKS, len(SIZES)

    def __init__(self, effects, bonus=None, noise=0.05):
        self.effects, self.bonus, self.looks, self.block_forwards = effects, bonus or {}, [], 0
        generator = torch.Generator().manual_seed(0)
        self.shared = [3 * torch.rand(size, SCORED, generator=generator) for size in SIZES]
        self.noises = [noise * torch.randn(BLOCKS, size, SCORED, generator=generator) for size in SIZES]

    def evaluate(self, solutions, batch):
        self.looks.append(([solution.removed for solution in solutions], batch))
        return [self._losses(solution.removed, batch) for solution in solutions]

    def _losses(self, removed, batch):
        effect = sum(self.effects[b] for b in removed)
        effect += sum(value for both, value in self.bonus.items() if set(both) <= set(removed))
        return self.shared[batch] + effect + sum(self.noises[batch][b] for b in removed)

    screen = evaluate

    def settle(self, _):
        pass


def run(evaluator, remove, z=3.0, **more):
    problem = Problem(None, None, evaluator, remove, evaluator=evaluator, **more)
    return Greedy(z).run(problem, lambda _: None)


def spread(seed=1):
    return (0.02 + 0.5 * torch.rand(BLOCKS, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_argmin_is_found_with_few_looks(seed):
    effects = spread(seed)
    raced, exact = Additive(effects), Additive(effects)
    result = run(raced, 4)
    assert result.removed == run(exact, 4, z=None).removed == tuple(sorted(range(BLOCKS), key=effects.__getitem__)[:4])
    work = [sum(len(solutions) * SIZES[batch] for solutions, batch in evaluator.looks) for evaluator in (raced, exact)]
    assert work[0] < 0.3 * work[1]


def test_at_most_half_stay_after_each_batch_where_noise_hides_everything():
    evaluator = Additive([0.1] * BLOCKS, noise=1.0)
    run(evaluator, 1)
    looked = [len(solutions) for solutions, _ in evaluator.looks[: len(SIZES)]]
    assert looked == [1 + count for count in (BLOCKS, *(max(2, math.ceil(BLOCKS / 2**k)) for k in (1, 2, 3)))]
    exact = Additive([0.1] * BLOCKS, noise=1.0)
    run(exact, 1, z=None)
    assert [len(solutions) for solutions, _ in exact.looks[: len(SIZES)]] == [1 + BLOCKS] * 4


def test_who_lost_clearly_is_not_looked_at_again_and_who_may_win_is():
    effects = [0.10, 0.11, 0.111, 0.112, 0.113, 0.114, *[2.0] * 10]
    evaluator = Additive(effects, noise=0.3)
    first = run(evaluator, 2).removed[0]
    second = [solutions for solutions, batch in evaluator.looks if batch == 0 and len(solutions[-1]) == 2]
    again = {block for solutions in second for gone in solutions if len(gone) == 2 for block in gone}
    assert again - {first} == {0, 1, 2, 3, 4, 5} - {first}
    assert len(second[0]) == 1 + FEW  # as it stands, and the best few; then those near them
    # with 0 gone each of the few costs far more: now the others have to be looked at
    evaluator = Additive(effects, dict.fromkeys(itertools.combinations(range(6), 2), 3.0))
    assert run(evaluator, 2).removed[1] > 5


@pytest.mark.parametrize("batches", [1, len(SIZES)])
def test_what_an_earlier_round_measured_on_other_text_counts(batches):
    """Block 3 is not surely worse than block 0 on the first batch, but it is on all of the text."""
    evaluator = Additive([0.1, *[0.7] * 3, *[3.0] * 12], noise=3.0)
    evaluator.noises = [noise - noise.mean((1, 2), keepdim=True) for noise in evaluator.noises]

    def losses(*removed):
        return {batch: Losses.of(evaluator._losses(removed, batch)) for batch in range(batches)}

    start = losses()
    known = {
        block: {batch: after.minus(start[batch]) for batch, after in losses(block).items()} for block in range(BLOCKS)
    }
    problem = Problem(None, None, evaluator, 1, evaluator=evaluator)
    assert Race(problem, (), known, 3.0, "", lambda _: None).winner() == 0
    later = {gone for solutions, batch in evaluator.looks if batch for gone in solutions}
    assert ((3,) in later) == (batches == 1)


@pytest.mark.parametrize(("noise", "same", "worse"), [(0.2, 12, 0.0), (1.0, 9, 0.01)])
def test_the_answer_is_mostly_that_of_all_losses_and_nearly_as_good(noise, same, worse):
    """Noise in nats a token: of 0.2, means over all of the text err by 0.004, over the first batch by 0.013."""
    pairs = [[run(Additive(spread(seed), noise=noise), 3, z) for z in (3.0, None)] for seed in range(12)]
    assert sum(raced.solution == exact.solution for raced, exact in pairs) >= same
    assert sum(raced.loss - exact.loss for raced, exact in pairs) / 12 <= worse


def test_a_race_goes_on_where_it_was_stopped(tmp_path):
    whole = Additive(spread())
    result = run(whole, 4, trajectory=Trajectory(tmp_path / "t", []))
    lines = (tmp_path / "t").read_text().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        (tmp_path / "t").write_text("".join(lines[:kept]))
        rest = Additive(spread())
        assert (
            run(rest, 4, trajectory=Trajectory(tmp_path / "t", [])).solution
            == result.solution
            == Solution.of(result.removed)
        )
        assert len(rest.looks) <= len(whole.looks)
    assert rest.looks[-1][1] == len(SIZES) - 1
    done = Additive(spread())
    (tmp_path / "t").write_text("".join(lines))
    run(done, 4, trajectory=Trajectory(tmp_path / "t", []))
    assert not done.looks
