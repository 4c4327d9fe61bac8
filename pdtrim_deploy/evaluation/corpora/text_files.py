"""`dir:PATH` and `file:PATH`: the user's own UTF-8 text."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.paths import expanded

_PART = 8000  # characters: about four Brown samples' worth of windows, and many parts in a book


class TextDirectory:
    """Every .txt below the folder is one document, named by its path there; copies fall into the same split."""

    usage = "dir:PATH"

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """Documents sorted by name."""
        root = expanded(place)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give dir: a folder of .txt files")
        files = sorted(path for path in root.rglob("*.txt") if not path.is_dir())
        texts, first = {f.relative_to(root).as_posix(): _read(f) for f in files}, dict[str, str]()
        documents = tuple(Document(n, text, group=first.setdefault(text, n)) for n, text in texts.items() if text)
        if not documents:
            raise UserError(f"{root}: no .txt file with text in it; give dir: a folder of .txt files")
        return documents


class TextFile:
    """One file, cut at paragraph ends into parts of at least 8,000 characters: the documents."""

    usage = "file:PATH"

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """Parts in order."""
        path = expanded(place)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give file: a UTF-8 text")
        parts: list[str] = [""]
        for paragraph in _read(path).split("\n\n"):
            if len(parts[-1]) >= _PART:
                parts.append("")
            parts[-1] += ("\n\n" if parts[-1] else "") + paragraph
        if not parts[0]:
            raise UserError(f"{path}: no text in it; give file: a UTF-8 text")
        return tuple(Document(f"{path.name}#{n:04}", part) for n, part in enumerate(parts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert it or leave it out") from None
