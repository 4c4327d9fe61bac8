"""Text to calibrate on and to judge by: documents, and splits that never share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol, get_args

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache

Split = Literal["calibration", "development", "final"]
SPLITS: tuple[Split, ...] = get_args(Split)
Log = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text; `id` is unique within its corpus and stable."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    documents: tuple[Document, ...]

    def split(self, split: Split) -> tuple[Document, ...]:
        """The documents of one split, in corpus order; the three are disjoint and together the corpus.

        Documents are ranked by the SHA-256 of their id and dealt out 40 : 20 : 40, so that order, genre and author
        do not decide, and none is empty. UserError for fewer than three documents or an unknown split.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        return tuple(d for d in self.documents if self._split_of[d.id] == split)

    @cached_property
    def _split_of(self) -> dict[str, Split]:
        total = len(self.documents)
        if total < len(SPLITS):
            raise UserError(f"corpus {self.name} has {total} documents; disjoint splits need at least {len(SPLITS)}")
        ranked = sorted((d.id for d in self.documents), key=lambda id: sha256(id.encode()).digest())
        share = max(1, total * 2 // 5)
        split: dict[str, Split] = dict.fromkeys(ranked, "development")
        return split | dict.fromkeys(ranked[:share], "calibration") | dict.fromkeys(ranked[-share:], "final")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and texts, 64 hex digits: says in a report which text was judged."""
        digest = sha256()
        for document in self.documents:
            for part in (document.id, document.text):
                digest.update(f"{len(part)}:{part}".encode())
        return digest.hexdigest()


class CorpusKind(Protocol):
    """One way to get text."""

    @property
    def usage(self) -> str:
        """How a user writes it, say `dir:PATH`."""
        ...

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """The documents; `place` is what stands behind the colon ("" without one). UserError when not to be had."""
        ...
