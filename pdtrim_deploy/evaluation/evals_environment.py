"""Find the Python of `.venv/evals`, which holds lm-evaluation-harness and sgl-eval; their pins clash with ours."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.own_environment import REPO, made_in_clone

_HERE = Path(".venv", "evals", "bin")


def python(repo: Path = REPO) -> Path:
    """That of the clone's `.venv/evals`, installed on first use; without a clone, of `.venv/evals` here.

    Raises:
        UserError: it could not be installed, or does not exist.

    """
    programs = made_in_clone("evals", "lm-eval and sgl-eval", "1 GB", repo)
    if programs is None and (_HERE / "python").exists():
        programs = _HERE.absolute()
    if programs is None:
        raise UserError(
            "the tasks of other harnesses need an environment of their own; make it with: python3 -m venv .venv/evals "
            "&& .venv/evals/bin/pip install lm-eval==0.4.13 sgl-eval==0.1.3"
        )
    return programs / "python"
