"""Where the program aiperf is. Its pins clash with SGLang's and with ours, so it is never imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pdtrim_deploy.errors import UserError

REPO = Path(__file__).resolve().parents[3]  # in a clone; in an installed wheel, a folder without tools/
VERSION = "0.13.0"  # of constraints/aiperf.txt; the format of raw records is that of a version


def program(repo: Path = REPO) -> Path:
    """The one in the clone's `.venv/aiperf`, made on first use; elsewhere `.venv/aiperf` here or PATH's.

    Raises:
        UserError: making it failed, it is of another version, or there is none.

    """
    tool, ours = repo / "tools" / "environment.py", Path(".venv", "aiperf", "bin", "aiperf")
    if tool.is_file():
        if not (repo / ours).exists():
            print("making .venv/aiperf for the load driver aiperf, once: about a minute, 1.2 GB", file=sys.stderr)
        setup = subprocess.run([sys.executable, tool, "aiperf"], check=False, capture_output=True, text=True)
        if setup.returncode:
            last = (setup.stderr.strip() or setup.stdout.strip() or "no output").splitlines()[-1]
            raise UserError(f"the load driver aiperf could not be installed ({last}); or use --driver builtin")
        return repo / ours
    path = ours.absolute() if ours.exists() else shutil.which("aiperf")
    if path is None:
        raise UserError(
            "the load driver aiperf is not installed; make it with: python3 -m venv .venv/aiperf && "
            f".venv/aiperf/bin/pip install aiperf=={VERSION}, or use --driver builtin"
        )
    version = subprocess.run([path, "--version"], check=False, capture_output=True, text=True).stdout.strip()
    if version != VERSION:
        raise UserError(f"{path} is aiperf {version or 'of no version'}, its records are read as {VERSION} writes them")
    return Path(path)
