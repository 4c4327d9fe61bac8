"""The loss piece by piece against whole models: transformers for plain text, the oracle for PD."""

import pytest
import torch
from tinypd import BLOCKS, FAMILIES, make_oracle, make_plan, text, tiny

from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pruning.objective import NextTokenLoss, _growing
from pdtrim_deploy.pruning.solution import Solution


def evaluate(objective, removed):
    parts = []
    for batch in range(objective.batches):
        hidden = objective.start(batch)
        for op in Solution.of(removed).route(BLOCKS):
            hidden = objective.run(batch, op, hidden)
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
    got = evaluate(NextTokenLoss(model, ids, 8, Solution((3,)), batch=2), (1, 3))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sequences", "most", "first", "sizes"),
    [
        (1, 8, 2, [1]),
        (16, 8, 2, [2, 2, 4, 8]),
        (16, 8, 1, [1, 1, 2, 4, 8]),
        (21, 8, 2, [2, 2, 4, 8, 5]),
        (5, 1, 2, [1] * 5),
        (3, 2, 2, [2, 1]),
    ],
)
def test_batches_grow(sequences, most, first, sizes):
    assert _growing(sequences, most, first) == sizes
