"""`agreement`: how far the dense model's own greedy text stays the likeliest.

The dense model's greedy continuation is teacher-forced through each plan in one pass. `top1` is the share of its
tokens that are the plan's likeliest too. `prefix` is the share of tokens before the first that is not: exactly what
the plan's own greedy run would share with dense, for up to there both have read the same tokens.
"""

from __future__ import annotations

from torch import Tensor

from pdtrim_deploy.evaluation.corpora.sampling import windows
from pdtrim_deploy.evaluation.tasks.base import Part, Setting, Task, Values
from pdtrim_deploy.evaluation.tasks.judge import Judgement, greedy

PROMPT, TOKENS, BATCH = 512, 32, 8


def read(continuations: Tensor, lengths: Tensor, judgement: Judgement) -> Values:
    """`top1` and `prefix` of each prompt, 0 to 1; the first token is prefill's own."""
    same = (judgement.top[:, 0] == continuations[:, 0]).double()
    return {"top1": same.mean(-1), "prefix": same.cumprod(-1).mean(-1)}


def prepare(setting: Setting, prompt: int = PROMPT, tokens: int = TOKENS) -> Task:
    """`setting.size` prompts (16), each with `tokens` greedy tokens of `setting.dense`."""
    count = setting.size or 16
    texts = windows(setting.documents, setting.tokenizer, count, prompt, setting.seed)
    prompts = texts.ids
    generated: list[list[int]] = []
    for part in prompts.split(BATCH):
        generated += greedy(setting.dense, part, tokens).tolist()
        setting.note(f"agreement: dense text of {len(generated)}/{count} prompts")
    part = Part.of(prompts, [[row] for row in generated], [str(prompt)] * count)
    return Task("agreement", (part,), read, documents=texts.documents)
