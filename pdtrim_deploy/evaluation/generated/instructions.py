"""Instructions about an answer's form, checked by a program: what IFEval does (Zhou et al., arXiv:2311.07911), our own.

Every kind of rule meets every topic once; a kind is the group of its questions.
"""

from __future__ import annotations

import hashlib

from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting
from pdtrim_deploy.evaluation.generated.checkers import Rule, keeps

TOPICS = (
    ("how bread is baked", "oven"),
    ("why the sky is blue", "light"),
    ("what a library is for", "books"),
    ("how a bicycle stays upright", "wheel"),
    ("what bees do in summer", "honey"),
    ("how rivers reach the sea", "water"),
    ("why people sleep", "brain"),
    ("how a letter reaches its address", "stamp"),
    ("what a good garden needs", "soil"),
    ("how trains keep to time", "clock"),
)
"""Each with a word that an answer can hold without effort."""


def rules(number: int, word: str) -> dict[str, tuple[str, tuple[Rule, ...]]]:
    """By kind, the instruction in words, and what checks it; sizes vary with the topic's number."""
    few, many = 20 + 3 * number, 50 + 5 * number
    items = 3 + number % 4
    return {
        "short": (f"Use at most {few} words.", (("words_at_most", few),)),
        "long": (f"Use at least {many} words.", (("words_at_least", many),)),
        "keyword": (f"Use the word '{word}' at least twice.", (("includes", word, 2),)),
        "forbidden": (f"Use at least 8 words, but not the word '{word}'.", (("excludes", word), ("words_at_least", 8))),
        "bullets": (
            f"Answer as a list of exactly {items} bullet points, each a line that begins with '* '.",
            (("bullets", items),),
        ),
        "paragraphs": (
            f"Write exactly {items - 1} paragraphs, separated by blank lines.", (("paragraphs", items - 1),)
        ),
        "lower": ("Write in lowercase letters only, without a single capital.", (("lower",),)),
        "upper": ("Write in CAPITAL LETTERS only.", (("upper",),)),
        "json": (
            "Answer with nothing but a JSON object that has exactly the keys 'title' and 'answer'.",
            (("json_keys", "title", "answer"),),
        ),
        "ending": ("End your answer with this very phrase: That is all.", (("ends", "That is all."),)),
        "commas": ("Use at least 8 words and not a single comma.", (("no_commas",), ("words_at_least", 8))),
        "both": (
            f"Use at most {few + 20} words, the word '{word}' among them, and lowercase letters only.",
            (("words_at_most", few + 20), ("includes", word), ("lower",)),
        ),
    }  # fmt: skip


def load(setting: Setting) -> QuestionSet:
    """120 questions; kinds take turns, so that the first N are of all."""
    del setting  # nothing is fetched
    questions = []
    for number, (topic, word) in enumerate(TOPICS):
        for kind, (instruction, checks) in rules(number, word).items():
            problem = f"Explain {topic}. {instruction}"
            questions.append(Question(f"{kind}-{number + 1}", problem, instruction, checks, kind))
    text = "\n".join(f"{question.problem}\t{question.check}" for question in questions)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return QuestionSet("instructions about form, our own", "Apache-2.0", sha256, tuple(questions))


def right(question: Question, text: str) -> bool:
    """Whether the answer keeps all rules of its question."""
    return keeps(question.check, text)


TASK = GeneratedTask("instructions", load, "{problem}", right)
