"""`austen`: Jane Austen's six novels by chapter (public domain), from Debian's r-cran-janeaustenr 1.0.0-1.

The package keeps R's lazy-load file `Rdata.rdb`: a run of chunks, each a big-endian length and a zlib stream of one
character vector in R's XDR serialisation version 3 (R Internals, section 1.8). The lines are wrapped: a paragraph is
joined again.
"""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus

_HINT = "run `apt-get update` once as root on a Debian system, or use corpus brown or dir:PATH"
_CHAPTER = re.compile(r"(?:chapter|volume|finis|the end)\b", re.IGNORECASE)
_STRING_VECTOR = 16


def _character_vectors(rdb: bytes) -> Iterator[list[str]]:
    at = 0
    while at < len(rdb):
        (size,) = struct.unpack_from(">I", rdb, at)
        stream = zlib.decompressobj()
        data = stream.decompress(rdb[at + 4 :])
        at += len(rdb) - at - len(stream.unused_data)
        if len(data) != size or data[:6] != b"X\n\x00\x00\x00\x03":
            raise ValueError("not R serialisation version 3")
        here = 2 + 3 * 4  # magic; version, writer, oldest reader
        here += 4 + struct.unpack_from(">I", data, here)[0]  # native encoding
        kind, count = struct.unpack_from(">II", data, here)
        if kind & 0xFF != _STRING_VECTOR:
            raise ValueError("not a character vector")
        here += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", data, here + 4)
            lines.append(data[here + 8 : here + 8 + length].decode("utf-8"))
            here += 8 + length
        yield lines


def _paragraphs(lines: list[str]) -> str:
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return "\n\n".join(" ".join(block.split()) for block in blocks if block.strip())


def _chapters(lines: list[str]) -> Iterator[str]:
    starts = [n for n, line in enumerate(lines) if _CHAPTER.match(line.strip()) and len(line) < 30]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = _paragraphs(lines[start + 1 : stop])
        if text:
            yield text


def parse(package: Path) -> Iterator[Document]:
    """Chapters in order, named like `emma/01`."""
    tree = package.parent / "tree"
    run = subprocess.run(
        ("dpkg-deb", "-x", package.name, tree.name), cwd=package.parent, capture_output=True, text=True, check=False
    )
    rdbs = list(tree.rglob("data/Rdata.rdb"))
    if run.returncode or len(rdbs) != 1:
        raise UserError(f"corpus austen: cannot unpack {package.name} ({run.stderr.strip()}); {_HINT}")
    for lines in _character_vectors(rdbs[0].read_bytes()):
        title = re.sub(r"\W+", "-", next(line for line in lines if line.strip()).lower()).strip("-")
        for number, text in enumerate(_chapters(lines), 1):
            yield Document(f"{title}/{number:02}", text)


AUSTEN = FetchedCorpus(
    usage="austen",
    command=("apt-get", "--quiet", "--quiet", "download", "r-cran-janeaustenr=1.0.0-1"),
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    parse=parse,
    hint=_HINT,
)
