"""The lines of a trace as Mooncake publishes them: when, how long, and which blocks of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.bounds import MOST_TOKENS


@dataclass(frozen=True)
class Row:
    """One request, of line `number`; `at_ms` after the trace's first one."""

    number: int
    at_ms: float
    input_tokens: int
    output_tokens: int
    ids: tuple[int, ...]


def rows(path: Path) -> Iterator[Row]:
    """The requests in order.

    Raises:
        UserError: a line is no request or earlier than the one before, or there is no request at all.

    """
    started, last = None, 0.0
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                at, length, output = float(row["timestamp"]), int(row["input_length"]), int(row["output_length"])
                ids = tuple(int(id_) for id_ in row.get("hash_ids", ()))
                if not (math.isfinite(at) and 1 <= length <= MOST_TOKENS and 1 <= output <= MOST_TOKENS):
                    raise ValueError
            except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{path}: line {number} is no request; allowed: JSON with a finite timestamp (ms), input_length "
                    f"and output_length from 1 to {MOST_TOKENS}, and a list hash_ids of numbers"
                ) from None
            started = at if started is None else started
            if at - started < last:
                raise UserError(f"{path}: line {number} is earlier than the line before; sort the trace by timestamp")
            last = at - started
            yield Row(number, last, length, output, ids)
    if started is None:
        raise UserError(f"{path}: no line is a request; give a trace with at least one")
