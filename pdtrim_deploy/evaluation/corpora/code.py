"""`code`: the Python source of NetworkX 3.6.1 (BSD-3-Clause), a file a document, from its wheel on PyPI."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel

_LEAST = 2000  # characters: shorter files are lists of imports


def parse(archive: Path) -> Iterator[Document]:
    """Files in order of their paths."""
    with zipfile.ZipFile(archive) as members:
        for name in sorted(members.namelist()):
            if name.endswith(".py") and members.getinfo(name).file_size >= _LEAST:
                yield Document(name, members.read(name).decode("utf-8").strip())


CODE = FetchedCorpus(
    usage="code",
    command=wheel("networkx==3.6.1"),
    sha256="d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    parse=parse,
    hint="check the network, or give your own source as dir:PATH",
)
