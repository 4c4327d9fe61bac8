"""Environments of other projects' programs, `.venv/NAME`, whose pins clash with ours: made on first use in a clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import last_line

REPO = Path(__file__).resolve().parents[2]  # in a clone; in an installed wheel, a folder without tools/


def made_in_clone(name: str, holds: str, size: str, repo: Path = REPO) -> Path | None:
    """The folder of programs of the clone's `.venv/NAME`, made if it does not stand yet; None without a clone.

    Raises:
        UserError: it could not be made.

    """
    tool, programs = repo / "tools" / "environment.py", repo / ".venv" / name / "bin"
    if not tool.is_file():
        return None
    if not programs.exists():
        print(f"making .venv/{name} for {holds}, once: about a minute, {size}", file=sys.stderr)
    setup = subprocess.run([sys.executable, tool, name], check=False, capture_output=True, text=True)
    if setup.returncode:
        last = last_line(setup.stderr if setup.stderr.strip() else setup.stdout)
        raise UserError(f"the environment of {holds} could not be made ({last}); see make setup-{name}")
    return programs
