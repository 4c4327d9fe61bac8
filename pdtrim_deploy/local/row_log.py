"""Rows of work done, one JSON object a line, appended as they come: work that is killed at any moment goes on there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError

Row = dict[str, Any]


class RowLog:
    """An append-only file of rows. Opening it only reads; a row stands on the disk when `append` returns.

    The first line holds a digest of what the rows are about; rows about anything else do not count, and are replaced
    by the first row that is appended. A last line that is cut short, because its writer was killed, is dropped.

    Args:
        path: None keeps rows in memory alone.
        about: everything (JSON) that the rows depend on.

    Attributes:
        rows: those found and those appended since, oldest first.

    """

    def __init__(self, path: Path | None = None, about: Any = None) -> None:
        self.path, self.rows = path, list[Row]()
        self._header = _line({"about": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()})
        self._good = 0  # bytes that are whole rows about the same
        if path is not None:
            self._read(path)

    @property
    def exists(self) -> bool:
        """Whether the file is there and is about the same, with or without rows."""
        return self._good > 0

    def find(self, **key: Any) -> Row | None:
        """The newest row with these values; None when there is none."""
        return next((row for row in reversed(self.rows) if all(row.get(k) == v for k, v in key.items())), None)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """The value kept under that name, or what `make` returns, kept from now on; both as JSON has it."""
        row = self.find(name=name)
        if row is None:
            row = json.loads(json.dumps({"name": name, "value": make()}))
            self.append(row)
        return row["value"]

    def begin(self) -> None:
        """Make the file with its first line, or cut off what is no whole row; UserError as `append`."""
        self.append()

    def restart(self) -> None:
        """Drop all rows, from the disk as well."""
        self.rows, self._good = [], 0
        self.begin()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows to the disk; UserError when that fails, and what stood there still stands."""
        if self.path is not None:
            lines = b"".join(map(_line, rows))
            self._write(self.path, lines if self._good else self._header + lines)
        self.rows += map(dict, rows)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        if lines[:1] != [self._header]:
            return
        self._good = len(self._header)
        for line in lines[1:]:
            row = None
            with suppress(ValueError):
                row = json.loads(line) if line.endswith(b"\n") else None
            if not isinstance(row, dict):
                break
            self.rows.append(row)
            self._good += len(line)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.tell() != self._good:  # not written anew: a kill would lose what stands there
                    os.truncate(path, self._good)
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        os.truncate(path, self._good)
                    raise
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}); mend that, say free some space, "
                "and run the same command again: it goes on where it was"
            ) from error
        self._good += len(data)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
