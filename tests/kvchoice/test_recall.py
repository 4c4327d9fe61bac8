"""Calibration text that asks for the middle of its prompt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice.recall import with_recall
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.recall_bounds import CUE, fits


@given(
    prompt=st.integers(60, 600),
    continuation=st.integers(2, 80),
    count=st.integers(1, 12),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 9),
)
def test_the_end_says_a_passage_of_the_middle_again(prompt, continuation, count, share, seed):
    if not fits(prompt, continuation):
        return
    ids = torch.arange(count * (prompt + continuation)).view(count, -1)
    recalled = with_recall(ids, prompt, share, seed)
    changed = [at for at in range(count) if not torch.equal(recalled[at], ids[at])]
    assert len(changed) == round(share * count)
    for at in changed:
        end = recalled[at, prompt - CUE :]
        start = int(end[0] - ids[at, 0])
        assert prompt // 8 <= start
        assert start + len(end) <= prompt - prompt // 4
        assert torch.equal(end, ids[at, start : start + CUE + continuation])
        assert torch.equal(recalled[at, : prompt - CUE], ids[at, : prompt - CUE])
    assert torch.equal(recalled, with_recall(ids, prompt, share, seed))


def test_prompts_too_short_for_a_passage_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    kv = "{method: budget, reduction: 2.0, recall: 0.5, prompt_tokens: 64, sparse_choices: [[4, 16]]}"
    path.write_text(f"name: x\nmodel: {{source: 'hf:m'}}\nkv: {kv}\n")
    with pytest.raises(UserError, match="no passage long enough"):
        Recipe.load(path)
