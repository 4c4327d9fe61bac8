"""The rate and the time left of work that tells how far it is: `redundancy: 12/30 blocks`, `3 of 8 sequences`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdtrim_deploy.local.duration import duration

_COUNT = re.compile(r"(\d[\d,]*)(?:/| of )(\d[\d,]*)(?![\d.])( MB\b)?")


@dataclass
class _Start:
    label: str
    done: int
    at: float
    last: int


class TimeLeft:
    """Reads lines of progress; counts of the same thing differ in numbers, and in what is behind a comma."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start = clock, _Start("", 0, 0.0, 0)

    def of(self, line: str) -> str:
        """`line`, and behind it the rate and the time left by the last count in it, once two lines have told it.

        A line that ends with the time left, as steps that have a limit of minutes know it, stays as it is.
        """
        counts = list(_COUNT.finditer(line))
        if not counts or line.endswith(" left"):
            return line
        last, end = counts[-1], counts[-1].end()
        done, total = (int(number.replace(",", "")) for number in last.groups()[:2])
        counted, now = line[:end] + line[end:].partition(",")[0], self._clock()
        label = re.sub(r"\d[\d.,]*", "#", counted) + f" {total}"
        if label != self._start.label or done < self._start.last:  # other work, or the same from its beginning
            self._start = _Start(label, done, now, done)
            return line
        self._start.last = done
        ran, seconds = done - self._start.done, now - self._start.at
        if not ran or seconds <= 0 or done > total:
            return line
        rate = ran / seconds
        unit = last[3] or ""
        speed = f"{rate:.1f}{unit}/s" if unit or rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{line} ({speed}, {duration((total - done) / rate)} left)"
