"""Losses by a part of the vocabulary: exact where it is all of it, near elsewhere, never a search's answer."""

import pytest
import torch
from searches import stages_of
from tinypd import text, tiny
from torch import nn

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.pruning import vocabulary_sample
from pdtrim_deploy.pruning.evaluator import InProcess, mean_loss
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.vocabulary_sample import VocabularySample

VOCABULARY, TOKENS = 2048, 40


@pytest.fixture(scope="module")
def model():
    """Its predictions differ from token to token, as a trained model's do; text has the first tokens alone."""
    model = tiny("Llama")
    model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def small(monkeypatch):
    """As many tokens as so small a vocabulary allows."""
    monkeypatch.setattr(vocabulary_sample, "LIKELY", 1)
    monkeypatch.setattr(vocabulary_sample, "OTHERS", 128)


def states(model, batch=2):
    hidden = torch.randn(batch, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return hidden, text(batch, TOKENS, 3)


@pytest.mark.parametrize("scaling", [None, 4.0])
def test_all_tokens_give_the_losses_themselves(model, scaling):
    runner = Blockwise(model)
    runner.logits_scaling = scaling
    hidden, targets = states(model)
    everything = VocabularySample(torch.arange(VOCABULARY), torch.zeros(VOCABULARY))
    torch.testing.assert_close(
        everything.logprobs(runner, hidden, targets), runner.logprobs(hidden, targets), atol=1e-5, rtol=1e-5
    )


def test_a_sample_has_every_target_and_stands_for_every_token(model, small):
    runner, (hidden, targets) = Blockwise(model), states(model)
    sample = VocabularySample.of(runner, hidden, targets)
    likeliest = runner.logits(hidden).argmax(-1)
    assert set(targets.flatten().tolist()) | set(likeliest.flatten().tolist()) <= set(sample.tokens.tolist())
    assert sample.tokens.tolist() == sorted(set(sample.tokens.tolist()))
    assert len(sample.tokens) <= VOCABULARY / 2
    assert float(sample.weights.exp().sum()) == pytest.approx(VOCABULARY, rel=1e-5)
    exact, near = runner.logprobs(hidden, targets), sample.logprobs(runner, hidden, targets)
    unweighted = VocabularySample(sample.tokens, torch.zeros(len(sample.tokens))).logprobs(runner, hidden, targets)
    assert 0 < (near - exact).abs().mean() < (unweighted - exact).abs().mean() / 2


def test_no_sample_of_a_small_vocabulary(model):
    assert VocabularySample.of(Blockwise(model), *states(model)) is None


def test_screening_runs_the_head_on_a_part_and_the_answer_is_exact(model, small, monkeypatch):
    ids, rows, logprobs = text(6, 240, 0), list[int](), Blockwise.logprobs
    monkeypatch.setattr(Blockwise, "logprobs", lambda self, *a: rows.append(a[1].numel()) or logprobs(self, *a))
    stages = stages_of(model, ids, 1, 3, prompt_tokens=40)
    assert 0 < sum(rows) <= 6 * 2 * (239 + 2 * 199)  # of the last two of each round
    removed = Solution.of(stages.prefill.removed)
    exact = mean_loss(InProcess(NextTokenLoss(model, ids)), removed)
    assert stages.prefill.loss == pytest.approx(exact, abs=1e-6)
    behind = InProcess(NextTokenLoss(model, ids, 40, removed))
    assert stages.decode.loss == pytest.approx(mean_loss(behind, Solution.of(stages.decode.removed)), abs=1e-6)


def test_screened_losses_are_no_exact_ones(model, small):
    objective = NextTokenLoss(model, text(4, 60, 0))
    evaluator, lost = InProcess(objective), Solution.of((2,))
    screened = [evaluator.screen([NOTHING, lost], batch) for batch in range(evaluator.batches)]
    before = objective.block_forwards
    exact = [evaluator.evaluate([NOTHING, lost], batch) for batch in range(evaluator.batches)]
    assert objective.block_forwards == before  # last states are kept
    whole = torch.cat([losses[1] for losses in exact])
    assert mean_loss(evaluator, lost) == float(whole.double().mean())
    assert not torch.equal(torch.cat([losses[1] for losses in screened]), whole)
    for at in (0, 1):
        errors = torch.cat([near[at] - losses[at] for near, losses in zip(screened, exact, strict=True)])
        assert abs(errors.mean()) < 0.1
