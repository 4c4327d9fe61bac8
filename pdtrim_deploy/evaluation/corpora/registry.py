"""All corpora, and the one way in."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.agents import AGENTS
from pdtrim_deploy.evaluation.corpora.austen import AUSTEN
from pdtrim_deploy.evaluation.corpora.base import Corpus, CorpusKind, Log
from pdtrim_deploy.evaluation.corpora.brown import BROWN
from pdtrim_deploy.evaluation.corpora.code import CODE
from pdtrim_deploy.evaluation.corpora.hub import HubFile
from pdtrim_deploy.evaluation.corpora.json_lines import JSONLines
from pdtrim_deploy.evaluation.corpora.parquet import ParquetFile
from pdtrim_deploy.evaluation.corpora.questions import QUESTIONS
from pdtrim_deploy.evaluation.corpora.recall import Recall
from pdtrim_deploy.evaluation.corpora.text_files import TextDirectory, TextFile
from pdtrim_deploy.local.cache import Cache

CORPORA: dict[str, CorpusKind] = {
    "brown": BROWN,
    "austen": AUSTEN,
    "code": CODE,
    "questions": QUESTIONS,
    "agents": AGENTS,
    "recall": Recall(),
    "dir": TextDirectory(),
    "file": TextFile(),
    "jsonl": JSONLines(),
    "parquet": ParquetFile(),
    "hub": HubFile(),
}
OF_FILES = ("dir", "file", "jsonl", "parquet")  # kinds that a user has on this machine


def load(name: str, cache: Cache, log: Log = lambda _: None) -> Corpus:
    """The corpus that `name` (brown, code, dir:PATH, jsonl:PATH ...) stands for, fetched once; UserError otherwise."""
    kind, _, place = name.partition(":")
    if kind not in CORPORA:
        raise UserError(f"{name!r} is no corpus; use one of {', '.join(c.usage for c in CORPORA.values())}")
    return Corpus(name, CORPORA[kind].load(place, cache, log))
