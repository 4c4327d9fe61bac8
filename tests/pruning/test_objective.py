"""The loss piece by piece against whole models: transformers for plain text, the oracle for PD."""

import pytest
import torch
from tinypd import BLOCKS, FAMILIES, make_oracle, make_plan, text, tiny

from pdtrim_deploy.checkpoints.surgery import keep_blocks
from pdtrim_deploy.pruning.hidden_states import HiddenStates
from pdtrim_deploy.pruning.objective import NextTokenLoss, _growing


def evaluate(objective, removed):
    parts = []
    for batch in range(objective.batches):
        hidden = objective.start(batch)
        for block in (b for b in range(BLOCKS) if b not in removed):
            hidden = objective.run(batch, block, hidden)
        parts.append(objective.losses(batch, hidden))
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_loss_is_that_of_the_cut_model(family):
    model, ids, removed = tiny(family), text(5, 14), (1, 4)
    cut = keep_blocks(model, [b for b in range(BLOCKS) if b not in removed])
    with torch.no_grad():
        logits = cut(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    got = evaluate(NextTokenLoss(model, ids, batch=2), removed)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_pd_loss_is_that_of_the_oracle(family):
    model, ids = tiny(family), text(5, 18)
    oracle = make_oracle(model, make_plan(prefill=(3,), decode=(3, 1)))
    expected = -oracle.score(oracle.prefill(ids[:, :8]), ids[:, 8:])[:, 1:]
    got = evaluate(NextTokenLoss(model, ids, 8, (3,), batch=2), (1, 3))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_kept_hidden_states_give_the_same_losses_for_fewer_forwards():
    model, ids = tiny("Llama"), text(4, 14)
    objective = NextTokenLoss(model, ids, 6, batch=2)
    states = HiddenStates(objective)
    for removed, block in ((), 2), ((2,), 0), ((2, 0), 4):
        assert states.kept == [b for b in range(BLOCKS) if b not in removed]
        for candidate in states.kept:
            before = objective.block_forwards
            got = torch.cat([states.without(candidate, batch) for batch in range(objective.batches)])
            assert objective.block_forwards - before == 4 * sum(b > candidate for b in states.kept)
            torch.testing.assert_close(got, evaluate(objective, (*removed, candidate)), atol=1e-5, rtol=0)
        after = evaluate(objective, (*removed, block)).mean()
        assert states.remove(block) == pytest.approx(float(after), abs=1e-5)


@pytest.mark.parametrize(
    ("sequences", "most", "sizes"),
    [(1, 8, [1]), (16, 8, [2, 2, 4, 8]), (21, 8, [2, 2, 4, 8, 5]), (5, 1, [1] * 5), (3, 2, [2, 1])],
)
def test_batches_grow(sequences, most, sizes):
    assert _growing(sequences, most) == sizes
