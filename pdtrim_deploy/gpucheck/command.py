"""What both command lines do: find the Pythons, run the parts, write the file, choose the exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.base import add_plugins
from pdtrim_deploy.gpucheck.check import Outcome, check, write
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
    end, parts = time.monotonic() + seconds, parts_named(names)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that exists")
    add_plugins()
    here, serve = _environments(serve_python)
    with _ends_at_a_signal():
        outcome = check(parts, here, serve, end=end, done=partial(_write, typed, out), say=say)
    if not outcome.device:
        raise UserError(
            f"{outcome.rows[0].reason}; run it on a machine with a GPU ({out} says that every part was skipped)"
        )
    say(f"{out}: {', '.join(_counts(outcome))}")
    return 1 if outcome.failed else 0


def _write(typed: str, out: Path, outcome: Outcome) -> None:
    try:
        write(outcome, typed, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a file elsewhere") from None


def _environments(serve_python: Path | None) -> tuple[Environment, Environment | None]:
    """Of the Python that runs, and of SGLang's; both answer at the same time."""
    pythons = [Path(sys.executable), *filter(None, [_serve(serve_python)])]
    with ThreadPoolExecutor(2) as pool:
        here, *serve = pool.map(Environment.of, pythons)
    return here, next(iter(serve), None)


def _serve(python: Path | None) -> Path | None:
    """SGLang's Python; None where there is none, or where what finds it is not installed."""
    try:
        from pdtrim_deploy.serving.environment import ServeEnvironment
    except ModuleNotFoundError:
        if python is not None:
            raise UserError("--serve-python needs the package installed: pip install 'pdtrim-deploy[build]'") from None
        return None
    try:
        return ServeEnvironment.find(python).python
    except UserError:
        if python is not None:
            raise
        return None


@contextlib.contextmanager
def _ends_at_a_signal() -> Iterator[None]:
    """SIGTERM ends the part that runs, and its servers, as Ctrl-C does; without this they would go on alone."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _counts(outcome: Outcome) -> list[str]:
    return [f"{sum(row.status == status for row in outcome.rows)} {status}" for status in ("run", "failed", "skipped")]
