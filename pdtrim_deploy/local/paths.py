"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError


def expanded(text: str) -> Path:
    """The path with `~` and `~name` replaced; UserError for an unknown user name, or a null byte."""
    if "\0" in text:
        raise UserError(f"{text!r} contains a null byte, which no path may have; take it out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = text.partition("/")[0]
        raise UserError(f"{text}: {name} is not a user with a home folder here; write the full path") from None


def resolved(path: Path) -> Path:
    """The path, absolute and without links; UserError for a link that points to itself."""
    try:
        return path.resolve()
    except RuntimeError:  # Python 3.13 leaves such a link as it is
        raise UserError(
            f"{path}: a symbolic link there points back to itself; give the folder that it should point to"
        ) from None
