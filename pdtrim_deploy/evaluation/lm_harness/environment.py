"""Find the Python of `.venv/evals`, which holds lm-evaluation-harness and sgl-eval; their pins clash with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdtrim_deploy.errors import UserError

REPO = Path(__file__).resolve().parents[3]  # in a clone; in an installed wheel, a folder without tools/
_OURS = Path(".venv", "evals", "bin", "python")


def python(repo: Path = REPO) -> Path:
    """That of the clone's `.venv/evals`, installed on first use; without a clone, of `.venv/evals` here.

    Raises:
        UserError: it could not be installed, or does not exist.

    """
    tool = repo / "tools" / "environment.py"
    if not tool.is_file():
        if _OURS.exists():
            return _OURS.absolute()
        raise UserError(
            "the tasks of other harnesses need an environment of their own; make it with: python3 -m venv .venv/evals "
            "&& .venv/evals/bin/pip install lm-eval==0.4.13 sgl-eval==0.1.3"
        )
    if not (repo / _OURS).exists():
        print("making .venv/evals for lm-eval and sgl-eval, once: about a minute, 1 GB", file=sys.stderr)
    setup = subprocess.run([sys.executable, tool, "evals"], check=False, capture_output=True, text=True)
    if setup.returncode:
        last = (setup.stderr.strip() or setup.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"the environment of lm-eval and sgl-eval could not be made ({last}); see make setup-evals")
    return repo / _OURS
