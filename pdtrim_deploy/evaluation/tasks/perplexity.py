"""`perplexity`: continuations of real text behind prompts of several lengths.

All lengths judge the same continuations: the longest prompt's last tokens are the shorter ones, behind BOS where the
tokenizer has one. Groups are prompt lengths; `nll` is a sequence's mean in nats a token, so the exponential of a paired
mean is the perplexity ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.evaluation.corpora.sampling import beginning, windows
from pdtrim_deploy.evaluation.tasks.base import Part, Setting, Task, Values
from pdtrim_deploy.evaluation.tasks.judge import Judgement

LENGTHS = (128, 512, 2048)
TOKENS = 64


def read(continuations: Tensor, lengths: Tensor, judgement: Judgement) -> Values:
    """`nll` of each sequence."""
    return {"nll": -judgement.logprobs[:, 0].double().sum(-1) / lengths[:, 0]}


def prepare(setting: Setting, lengths: tuple[int, ...] = LENGTHS, tokens: int = TOKENS) -> Task:
    """`setting.size` sequences (16) at each of `lengths`."""
    count, longest = setting.size or 16, max(lengths)
    texts = windows(setting.documents, setting.tokenizer, count, longest + tokens, setting.seed)
    rows = texts.ids
    ends, bos = rows[:, longest:], len(beginning(setting.tokenizer))
    prompts = [torch.cat((rows[:, :bos], rows[:, longest - length + bos : longest]), 1) for length in lengths]
    parts = [
        Part.of(prompt, [[row] for row in ends.tolist()], [str(length)] * count)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return Task("perplexity", tuple(parts), read, repeated=True, documents=texts.documents)
