"""Corpora: real text fetched at run time, split by document."""

from pdtrim_deploy.evaluation.corpora.base import SPLITS, Corpus, Document, Split
from pdtrim_deploy.evaluation.corpora.mixture import mixed
from pdtrim_deploy.evaluation.corpora.registry import CORPORA, OF_FILES, load
from pdtrim_deploy.evaluation.corpora.sampling import prompts, sequences, windows

__all__ = [
    "CORPORA",
    "OF_FILES",
    "SPLITS",
    "Corpus",
    "Document",
    "Split",
    "load",
    "mixed",
    "prompts",
    "sequences",
    "windows",
]
