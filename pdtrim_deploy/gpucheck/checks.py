"""A part's checks: named before the first runs, so that each has a row whatever becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.row import Row

Figure = dict[str, float | int | str]


class NotHere(Exception):
    """A check that this machine cannot do, which shows only while it runs; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """A row to be.

    Attributes:
        name: of the row.
        measure: its figures; raises where it fails, NotHere where it cannot be done here.
        seconds: a check with less time left is not begun.
        skip: why this machine cannot do it; empty when it can.

    """

    name: str
    measure: Callable[[], Figure] = dict
    seconds: float = 0.0
    skip: str = ""


def rows_of(checks: Iterable[Check], end: float = float("inf")) -> Iterator[Row]:
    """A row of each; `end` is when the part's time is over, on the monotonic clock."""
    for check in checks:
        left = end - time.monotonic()
        if check.skip:
            yield Row(check.name, "skipped", check.skip)
        elif left < check.seconds:
            yield Row(check.name, "skipped", f"no time was left: it needs {check.seconds:.0f} s of its part's")
        else:
            yield _row(check)


def _row(check: Check) -> Row:
    """A check that raises has failed, and the others go on."""
    try:
        return Row(check.name, "run", figure=check.measure())
    except NotHere as reason:
        return Row(check.name, "skipped", str(reason))
    except Exception as error:
        return Row(check.name, "failed", sentence(error))


def sentence(error: Exception) -> str:
    """The first line of an error; errors that are sentences themselves go without their kind."""
    kind = "" if isinstance(error, AssertionError | UserError) else f"{type(error).__name__}: "
    return ((kind + str(error)).strip() or type(error).__name__).splitlines()[0][:300]
