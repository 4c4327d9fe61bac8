"""Baselines choose the blocks that their authors' own code chose, which was run once on this model and text.

SLEB: github jiwonsong-dev/SLEB at d07129a, `sleb.py` with its blocks skipped in transformers 5, on a CPU.
LLM-Streamline: github RUCKBReasoning/LLM-Streamline at adf50ba, `get_cosine_similarity` of all rows.
"""

import pytest
import torch
import transformers
from searches import stages_of
from tinypd import text, tiny

SLEB = (8, 2, 4, 5)  # in the order of their removal
WINDOWS = {2: (8, 9), 3: (7, 8, 9), 4: (6, 7, 8, 9)}


@pytest.fixture(scope="module")
def deep():
    config = tiny("Llama").config
    config.num_hidden_layers = 10
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_sleb(deep):
    result = stages_of(deep, text(6, 40), 4, 4, method="sleb")  # both stages alike: one model, as SLEB has it
    assert result.prefill.removed == SLEB


@pytest.mark.parametrize("count", WINDOWS)
def test_llm_streamline(deep, count):
    assert stages_of(deep, text(6, 40), 0, count, method="streamline").decode.removed == WINDOWS[count]
