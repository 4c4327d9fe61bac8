"""KL to the dense model against whole vocabularies, and the search and the judge that keep it low."""

import pytest
import torch
from searches import stages_of
from tinypd import BLOCKS, VOCABULARY, make_plan, text, tiny

from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_kl, prefill_kl
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.teacher import Teacher

ALL = VOCABULARY - 1  # the one left over is a token of its own: nothing is grouped
SPLIT = 8


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


def last_states(objective, removed):
    for batch in range(objective.batches):
        hidden = objective.start(batch)
        for op in Solution.of(removed).route(BLOCKS):
            hidden = objective.run(batch, op, hidden)
        yield batch, hidden


def evaluate(objective, removed):
    return torch.cat([objective.losses(batch, hidden) for batch, hidden in last_states(objective, removed)])


@torch.no_grad()
def whole(model, ids, removed, prefill=(), split=0):
    """KL over the whole vocabulary, by the NLL of each of its tokens."""
    dense = model(ids).logits[:, split:-1].log_softmax(-1)
    objective = NextTokenLoss(model, ids, split, Solution(prefill))
    parts = []
    for _, hidden in last_states(objective, removed):
        every = [objective._runner.logprobs(hidden, torch.full(hidden.shape[:2], v)) for v in range(VOCABULARY)]
        parts.append(torch.stack(every, -1))
    return (dense.exp() * (dense - torch.cat(parts))).sum(-1)


@pytest.mark.parametrize(("prefill", "split"), [((), 0), ((3,), SPLIT)])
def test_kl_is_that_over_the_vocabulary_and_with_fewer_tokens_a_bound(model, prefill, split):
    ids, removed = text(5, 18), (*prefill, 1)
    expected = whole(model, ids, removed, prefill, split)
    kl = {
        top: evaluate(DenseKL(model, ids, split, Solution(prefill), teacher=Teacher.of(model, ids, top)), removed)
        for top in (4, ALL)
    }
    torch.testing.assert_close(kl[ALL], expected, atol=1e-4, rtol=0)
    assert (kl[4] < expected + 1e-4).all()
    assert kl[4].mean() > 0.2 * expected.mean()
    assert (kl[4] - expected).abs().max() > 1e-3, "the others count as one"


def test_the_dense_model_is_no_distance_from_itself(model):
    ids = text(5, 18)
    kl = evaluate(DenseKL(model, ids, SPLIT, teacher=Teacher.of(model, ids, 6)), ())
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-5, rtol=0)


def test_a_teacher_costs_the_model_once(model):
    ids = text(5, 18)
    teacher = Teacher.of(model, ids)
    assert teacher.block_forwards == BLOCKS * 5
    free, charged = (DenseKL(model, ids, teacher=teacher, charged=charged) for charged in (False, True))
    assert charged.block_forwards - free.block_forwards == BLOCKS * 5


@pytest.mark.parametrize("split", [None, 12])
def test_greedy_by_kl_takes_the_block_of_least_kl(model, split):
    ids = text(6, 20, seed=3)
    stages = stages_of(model, ids, 0, 2, method=Greedy(None), prompt_tokens=split, teacher=Teacher.of(model, ids, ALL))
    gone = ()
    for _ in range(2):
        at = 10 if split is None else split
        kl = {b: whole(model, ids, (*gone, b), (), at).mean() for b in range(BLOCKS) if b not in gone}
        gone = (*gone, min(kl, key=kl.get))
    assert stages.decode.removed == gone
    assert stages.decode.loss == pytest.approx(float(min(kl.values())), abs=1e-4)
    by_loss = stages_of(model, ids, 0, 2, method=Greedy(None), prompt_tokens=split)
    assert by_loss.decode.removed != gone, "a text that tells the objectives apart"


def test_kl_of_a_pair_is_that_of_both_stages(model):
    """Behind the prompt's last token it is prefill's, from there on decode's."""
    ids, prefill, decode = text(6, 2 * SPLIT), (3,), (1, 3)
    teacher, pair = Teacher.of(model, ids, 6), StagePair(model, make_plan(prefill, decode))
    alone = evaluate(DenseKL(model, ids, teacher=teacher), prefill)
    assert prefill_kl(pair, ids, teacher) == pytest.approx(float(alone.mean()), abs=1e-5)
    decode_kl = evaluate(DenseKL(model, ids, SPLIT, Solution(prefill), teacher=teacher), decode)
    both = torch.cat((alone[:, SPLIT - 1 : SPLIT], decode_kl), 1)
    assert pd_kl(pair, ids, teacher) == pytest.approx(float(both.mean()), abs=1e-5)


def test_the_judge_takes_each_half_with_its_own_predictions(model):
    ids, lost = text(6, 2 * SPLIT), Solution.of((1, 3))
    teacher = Teacher.of(model, ids, 6)
    judge = RefitJudge(model, make_plan().model, ids, "none", teacher=teacher)
    pair = StagePair(model, make_plan((), lost.removed))
    assert list(judge("decode", NOTHING, [lost])) == pytest.approx([pd_kl(pair, ids, teacher)], abs=1e-5)
