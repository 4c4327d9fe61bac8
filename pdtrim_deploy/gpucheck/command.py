"""What both command lines do: find the Pythons, run the parts, write the file, choose the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.check import NO_DEVICE, Outcome, check, write
from pdtrim_deploy.gpucheck.machine import Environment
from pdtrim_deploy.gpucheck.registry import parts_named


def run(
    out: Path, names: tuple[str, ...], serve_python: Path | None, seconds: float, typed: str, say: Callable[[str], None]
) -> int:
    """0: nothing failed, 1: a part failed.

    Raises:
        UserError: no such part, `out` cannot be written, no such Python, or no CUDA device; in the last case `out`
            is written all the same, every part skipped.

    """
    parts = parts_named(names)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that exists")
    own, serve = Environment.of(Path(sys.executable)), _serve(serve_python)

    def written(outcome: Outcome) -> None:
        write(outcome, typed, out)

    outcome = check(parts, own, serve, budget_s=seconds, done=written, say=say)
    if not outcome.device:
        raise UserError(f"{NO_DEVICE}; run it on a machine with a GPU ({out} says that every part was skipped)")
    say(f"{out}: {', '.join(_counts(outcome))}")
    return 1 if outcome.failed else 0


def _serve(python: Path | None) -> Environment | None:
    """SGLang's Python; None where there is none, or where what finds it is not installed."""
    try:
        from pdtrim_deploy.serving.environment import ServeEnvironment
    except ModuleNotFoundError:
        if python is not None:
            raise UserError("--serve-python needs the package installed: pip install 'pdtrim-deploy[build]'") from None
        return None
    try:
        serve_python = ServeEnvironment.find(python).python
    except UserError:
        if python is not None:
            raise
        return None
    return Environment.of(serve_python)


def _counts(outcome: Outcome) -> list[str]:
    return [f"{sum(row.status == status for row in outcome.rows)} {status}" for status in ("run", "failed", "skipped")]
