"""Text to calibrate on and to judge by: documents, and splits that never share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol, get_args

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache

Split = Literal["calibration", "development", "final"]
SPLITS: tuple[Split, ...] = get_args(Split)
Log = Callable[[str], None]


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who speaks in a conversation."""


@dataclass(frozen=True)
class Document:
    """One text; `id` is unique within its corpus and stable.

    Attributes:
        text: of a conversation, what is said in it.
        messages: of a conversation, role and content of each message.
        group: documents of equal groups fall into the same split; each is alone where it is empty.
        line: where a user wrote it: what is wrong with it is said of that place.
        tokens: of a text, how many of its first tokens the request has; None: all.

    """

    id: str
    text: str
    messages: tuple[tuple[str, str], ...] = ()
    group: str = ""
    line: str = ""
    tokens: int | None = None

    @property
    def served(self) -> bool:
        """Whether it stands for a request of its own: sequences begin where such documents begin."""
        return bool(self.messages or self.line or self.tokens)


def conversation(name: str, messages: Sequence[tuple[str, str]], group: str = "") -> Document:
    """A document of messages: role and content of each."""
    return Document(name, "\n\n".join(content for _, content in messages), tuple(messages), group)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    documents: tuple[Document, ...]

    def split(self, split: Split) -> tuple[Document, ...]:
        """The documents of one split, in corpus order; the three are disjoint and together the corpus.

        Documents are ranked by the SHA-256 of their id (or group) and dealt out 40 : 20 : 40, so that order, genre and
        author do not decide, and none is empty. UserError for fewer than three documents or an unknown split.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        return tuple(d for d in self.documents if self._split_of[d.group or d.id] == split)

    @cached_property
    def _split_of(self) -> dict[str, Split]:
        groups = {d.group or d.id for d in self.documents}
        total = len(groups)
        if total < len(SPLITS):
            what = "documents" if total == len(self.documents) else "documents with different texts or beginnings"
            raise UserError(f"corpus {self.name} has {total} {what}; disjoint splits need at least {len(SPLITS)}")
        ranked = sorted(groups, key=lambda group: sha256(group.encode()).digest())
        share = max(1, total * 2 // 5)
        split: dict[str, Split] = dict.fromkeys(ranked, "development")
        return split | dict.fromkeys(ranked[:share], "calibration") | dict.fromkeys(ranked[-share:], "final")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and texts, 64 hex digits: says in a report which text was judged."""
        digest = sha256()
        for document in self.documents:
            for part in (document.id, document.text, *(part for message in document.messages for part in message)):
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
