"""Find the program aiperf. Its pins conflict with SGLang's and with ours, so it is never imported."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.own_environment import REPO, made_in_clone

VERSION = "0.13.0"  # as in constraints/aiperf.txt; the format of raw records depends on the version


def program(repo: Path = REPO) -> Path:
    """The program in the clone's `.venv/aiperf`, installed on first use; without a clone `.venv/aiperf` here, or PATH.

    Raises:
        UserError: it could not be installed, has another version, or was not found.

    """
    try:
        programs = made_in_clone("aiperf", "the load driver aiperf", "1.2 GB", repo)
    except UserError as error:
        raise UserError(f"{error}, or use --driver builtin") from None
    if programs is not None:
        return programs / "aiperf"
    ours = Path(".venv", "aiperf", "bin", "aiperf")
    path = ours.absolute() if ours.exists() else shutil.which("aiperf")
    if path is None:
        raise UserError(
            "the load driver aiperf is not installed; make it with: python3 -m venv .venv/aiperf && "
            f".venv/aiperf/bin/pip install aiperf=={VERSION}, or use --driver builtin"
        )
    version = subprocess.run([path, "--version"], check=False, capture_output=True, text=True).stdout.strip()
    if version != VERSION:
        raise UserError(
            f"{path} is aiperf {version or 'of no version'}, but its records can only be read from version {VERSION}"
        )
    return Path(path)
