import math

import pytest
import torch
from tinypd import BLOCKS, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.perplexity import pd_perplexity


def test_dense_perplexity_is_that_of_the_plain_model():
    model, ids, lines = tiny("Llama"), text(5, 20), []
    with torch.no_grad():
        logits = model(ids).logits[:, 7:-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 8:], reduction="none").mean(1)
    got = pd_perplexity(make_oracle(model, make_plan()), ids, 8, batch=2, progress=lines.append)
    assert got.per_sequence == pytest.approx(expected.tolist(), abs=1e-5)
    assert got.nll_mean == pytest.approx(float(expected.mean()), abs=1e-5)
    assert got.ppl == pytest.approx(math.exp(got.nll_mean))
    assert got.tokens == 5 * 12
    assert lines[-1] == "perplexity: 5/5 sequences"


def test_batches_do_not_matter_and_sparse_does():
    model, ids = tiny("Qwen2"), text(5, 20)
    sparse = make_oracle(model, make_plan(decode=(1,), kv=(SPARSE,) * (BLOCKS - 1)))
    one_by_one, all_at_once = (pd_perplexity(sparse, ids, 12, batch=batch) for batch in (1, 5))
    assert one_by_one.per_sequence == pytest.approx(all_at_once.per_sequence, abs=1e-5)
    full = make_oracle(model, make_plan(decode=(1,)))
    assert abs(pd_perplexity(full, ids, 12).nll_mean - one_by_one.nll_mean) > 1e-3


@pytest.mark.parametrize("prompt", [0, 20, 30])
def test_nothing_to_score_is_refused(prompt):
    with pytest.raises(UserError, match=rf"prompt_tokens is {prompt} but .* choose from 1 to 19"):
        pd_perplexity(make_oracle(tiny("Llama"), make_plan()), text(1, 20), prompt)


def test_a_broken_model_is_reported():
    model = tiny("Llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="the loss is nan, not a number"):
        pd_perplexity(make_oracle(model, make_plan()), text(1, 20), 8)
