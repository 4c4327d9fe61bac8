"""Continuations against transformers' own greedy search, and against plain softmax."""

import pytest
import torch
from tinypd import FAMILIES, VOCABULARY, text, tiny

from pdtrim_deploy.models.continuation import continued


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_are_those_of_transformers(family):
    model, prompts = tiny(family), text(3, 9)
    free = model.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    assert torch.equal(continued(model, prompts, 12), free)
    never = sorted(set(free.flatten().tolist()))[:5]
    barred = model.generate(
        prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=never
    )[:, 9:]
    assert torch.equal(continued(model, prompts, 12, never), barred)


def test_a_sliding_window_is_kept():
    model, prompts = tiny("Mistral", sliding_window=6), text(2, 9)
    free = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    assert torch.equal(continued(model, prompts, 8), free)


def test_draws_choose_by_probability():
    model, prompt = tiny("Llama"), text(1, 9)
    with torch.no_grad():
        expected = model(prompt).logits[0, -1].softmax(-1)
    count = 4000
    draws = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    drawn = continued(model, prompt.expand(count, -1), 1, draws=draws)
    shares = torch.bincount(drawn[:, 0], minlength=VOCABULARY) / count
    torch.testing.assert_close(shares, expected, atol=2 / count, rtol=0)
    edge = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    first, last = continued(model, prompt.expand(2, -1), 1, never=(0, VOCABULARY - 1), draws=edge)[:, 0].tolist()
    assert 0 < first <= last < VOCABULARY - 1
