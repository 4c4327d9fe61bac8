"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError


def expanded(text: str) -> Path:
    """The path with `~` and `~name` replaced; UserError for a name that nobody has, or a null byte."""
    if "\0" in text:
        raise UserError(f"{text!r} holds a null byte, which no path may; take it out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = text.partition("/")[0]
        raise UserError(f"{text}: {name} is no user with a home here; write the path in full") from None


def resolved(path: Path) -> Path:
    """The path, absolute and without links; UserError for a link that leads to itself."""
    try:
        return path.resolve()
    except RuntimeError:  # Python 3.13 leaves such a link as it is
        raise UserError(f"{path}: a link there leads back to itself; name what it should lead to") from None
