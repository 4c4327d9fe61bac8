"""`needle`: a fact at ten depths of a long prompt of real text, asked for at the end.

The fact is "The secret code of the Lisbon vault is 48213."; the prompt ends with the question and "The secret code
of the Lisbon vault", the continuation is " is 48213". Only the code's tokens are judged, all of them by decode: " is"
takes the place that prefill judges. Depth 0 % is the very start, 100 % right before the question. Groups are depths.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.sampling import beginning, windows
from pdtrim_deploy.evaluation.tasks.base import Part, Setting, Task, Values
from pdtrim_deploy.evaluation.tasks.choice import continuation
from pdtrim_deploy.evaluation.tasks.judge import Judgement

PROMPT, SIZE, DEPTHS, CODES, DIGITS = 1024, 4, 10, 5, 5
CITIES = (
    "Lisbon", "Oslo", "Madrid", "Cairo", "Lima", "Prague", "Vienna", "Dublin", "Warsaw", "Athens",
    "Havana", "Tokyo", "Boston", "Geneva", "Berlin", "Paris",
)  # fmt: skip


def prepare(setting: Setting, prompt: int = PROMPT, depths: int = DEPTHS, codes: int = CODES) -> Task:
    """`setting.size` needles (4) at each of `depths`, every prompt with its own text, city and code.

    Args:
        prompt: tokens of every prompt.
        codes: codes to choose among, the right one and random others: `choice` by chance is 1 / codes.

    Raises:
        UserError: the prompt is too short for needle and question, or the corpus for so many prompts.

    """
    tokenizer, repeats, rng = setting.tokenizer, setting.size or SIZE, random.Random(setting.seed)
    count = repeats * depths
    texts = windows(setting.documents, tokenizer, count, prompt, setting.seed)
    prompts, answers, groups = [], [], []
    skip, bos = len(continuation(tokenizer, "vault", "is")), beginning(tokenizer)
    for number, text in enumerate(texts.ids.tolist()):
        depth = (number % depths) / max(1, depths - 1)
        city = rng.choice(CITIES)
        numbers = [f"{n:0{DIGITS}}" for n in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), codes)]
        about = f"The secret code of the {city} vault"
        body = _hidden(tokenizer, text[len(bos) :], f" {about} is {numbers[0]}.", about, city, depth)
        prompts.append(bos + body)
        answers.append([continuation(tokenizer, "vault", f"is {code}") for code in numbers])
        groups.append(f"{depth:.0%}")
    part = Part.of(torch.tensor(prompts), answers, groups)

    def read(continuations: Tensor, lengths: Tensor, judgement: Judgement) -> Values:
        """`exact`: every token of the code is the likeliest; `choice`: it is likelier than all other codes.

        `code_nll` is the code's NLL in nats a token.
        """
        places = torch.arange(continuations.shape[-1])
        code = (places >= skip) & (places < lengths[..., None])
        right = (judgement.top[:, 0] == continuations[:, 0]) | ~code[:, 0]
        score = torch.where(code, judgement.logprobs.double(), 0.0).sum(-1)
        return {
            "exact": right.all(-1).double(),
            "choice": (score[:, :1] > score[:, 1:]).all(-1).double(),
            "code_nll": -score[:, 0] / code[:, 0].sum(-1),
        }

    return Task("needle", (part,), read, documents=texts.documents)


def _hidden(tokenizer: Any, text: list[int], needle: str, about: str, city: str, depth: float) -> list[int]:
    """As many tokens as `text`: its head with the needle put in behind a sentence, and the question."""
    fact = tokenizer(needle, add_special_tokens=False)["input_ids"]
    wording = f"\n\nQuestion: What is the secret code of the {city} vault?\nAnswer: {about}"
    question = tokenizer(wording, add_special_tokens=False)["input_ids"]
    room = len(text) - len(fact) - len(question)
    if room < 1:
        raise UserError(f"task needle: a prompt of {len(text)} tokens holds no text beside needle and question")
    at = round(depth * room)
    if 0 < at < room:
        ends = [i + 1 for i in range(room - 1) if tokenizer.decode([text[i]]).strip().endswith((".", "!", "?"))]
        at = min(ends, key=lambda end: abs(end - at), default=at)
    return [*text[:at], *fact, *text[at:room], *question]
