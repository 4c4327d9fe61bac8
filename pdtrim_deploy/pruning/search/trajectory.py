"""What a search did, one JSON object a line, written as it goes: a search killed at any moment goes on there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from pdtrim_deploy.errors import UserError


class Trajectory:
    """Rows of one search. The file's first line says what was searched: another search's rows are thrown away.

    Args:
        path: None keeps the rows in memory only.
        asked: everything (JSON) that the answer depends on.

    Raises:
        UserError: the file cannot be written; what stands in it stays good.

    """

    def __init__(self, path: Path | None = None, asked: Any = None) -> None:
        self._path, self._began = path, monotonic()
        self._head = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._before: list[dict[str, Any]] = []
        self._next = 0
        if path is not None:
            self._before = self._read(path)
        self.seconds_before = self._before[-1]["seconds"] if self._before else 0.0
        self.forwards_before = self._before[-1].get("block_forwards", 0) if self._before else 0

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last may be half: its writer was killed
        try:
            head, *rows = [json.loads(line) for line in whole]
            if head == {"search": self._head}:
                if len(whole) < len(lines):
                    with self._mendable():
                        os.truncate(path, sum(map(len, whole)))  # and not written anew: a kill would lose the search
                return rows
        except ValueError:
            pass
        self._write(json.dumps({"search": self._head}).encode() + b"\n", "wb")
        return []

    @property
    def seconds(self) -> float:
        """Since the search began, pauses left out."""
        return self.seconds_before + monotonic() - self._began

    def replay(self) -> dict[str, Any] | None:
        """The next row that an earlier run wrote; None when there is no more."""
        if self._next == len(self._before):
            return None
        self._next += 1
        return self._before[self._next - 1]

    def append(self, **row: Any) -> None:
        """Write a row down, with the seconds; it stands on disk or UserError says why not."""
        if self._path is not None:
            self._write(json.dumps(row | {"seconds": round(self.seconds, 3)}).encode() + b"\n", "ab")

    def _write(self, data: bytes, mode: str) -> None:
        assert self._path is not None
        with self._mendable():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode) as file:
                file.write(data)

    @contextmanager
    def _mendable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error.strerror}); mend that, say free some space, "
                "and run the same command again: the search goes on where it was"
            ) from error
