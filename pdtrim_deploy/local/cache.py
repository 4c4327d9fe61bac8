"""A content cache: expensive results are computed once, and stored completely or not at all.

An entry is a folder `root/kind/key` that was filled elsewhere, flushed and renamed into place. Its last file is a
marker with the SHA-256 of every other file, so an incomplete or damaged entry is detected, deleted and computed again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError

MARKER = ".complete.json"
_USERS_TO_MEND = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST,
    errno.ELOOP,
}  # fmt: skip


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A scratch folder next to `target` that takes its place, flushed to disk, when the block ends well.

    A `target` that exists is replaced; on an exception it stays as it was and the scratch folder is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in (*scratch.rglob("*"), scratch):
            _flush(path)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            os.rename(target, old / "entry")
            os.rename(scratch, target)
            shutil.rmtree(old)
        else:
            os.rename(scratch, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Cache:
    """Entries below `root`, safe for several processes at once.

    Raises `UserError` where the folder cannot be written or the disk is full.
    """

    root: Path

    @classmethod
    def default(cls) -> Cache:
        """`$XDG_CACHE_HOME/pdtrim-deploy`, else `~/.cache/pdtrim-deploy`; UserError for a user without a home."""
        try:
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdtrim-deploy")
        except RuntimeError:  # as in a container with a user id of its own
            raise UserError(
                "this user has no home folder for the cache; set HOME, or name a folder with --cache-dir"
            ) from None

    def entry(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of (kind, key); `make(folder)` fills it unless a complete entry exists."""
        target = self.root / kind / key
        try:
            with self._lock(target):
                for stale in _scratch(target):
                    shutil.rmtree(stale, ignore_errors=True)  # left by a process that died: we hold the lock
                if not _undamaged(target):
                    with atomic_directory(target) as scratch:
                        make(scratch)
                        _mark(scratch)
        except OSError as error:
            if error.errno not in _USERS_TO_MEND:
                raise
            where = f": {error.filename}" if error.filename else ""  # none where a file was open
            raise UserError(
                f"cannot fill the cache {self.root} ({error.strerror}{where}); "
                "free some space or name another folder with --cache-dir"
            ) from error
        return target

    @contextmanager
    def _lock(self, target: Path) -> Iterator[None]:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _scratch(target: Path) -> list[Path]:
    """Folders that `atomic_directory` of this target left: new ones, and old ones that made way for it."""
    beginnings = tuple(f".{target.name}.{age}-" for age in ("new", "old"))
    return [path for path in target.parent.iterdir() if path.name.startswith(beginnings)]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)


def _mark(folder: Path) -> None:
    entries = {}
    for path in _files(folder):
        stat = path.stat()
        entries[path.relative_to(folder).as_posix()] = {
            "sha256": file_sha256(path),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
    (folder / MARKER).write_text(json.dumps({"files": entries}, indent=1))


def _undamaged(folder: Path) -> bool:
    """Whether the marker holds; a file is hashed again only when its size or time differ from the marker's."""
    try:
        entries = json.loads((folder / MARKER).read_text())["files"]
        if set(entries) != {p.relative_to(folder).as_posix() for p in _files(folder)}:
            return False
        for name, entry in entries.items():
            stat = (folder / name).stat()
            if stat.st_size != entry["size"]:
                return False
            if stat.st_mtime_ns != entry["mtime_ns"] and file_sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
