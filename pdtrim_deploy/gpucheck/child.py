"""The process of one part: `python -m pdtrim_deploy.gpucheck.child MODULE:FUNCTION FILE SECONDS [PYTHON FOLDER]`.

Its checks' names go into FILE, then a row of each. PYTHON is SGLang's, and FOLDER is for what the part builds: the
function's arguments, if they are given.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from pdtrim_deploy.gpucheck.base import line
from pdtrim_deploy.gpucheck.checks import rows_of


def main() -> None:
    """Each row is written as soon as it is there: what ran before a crash is kept."""
    function, file, seconds, *given = sys.argv[1:]
    end = time.monotonic() + float(seconds)
    module, _, name = function.partition(":")
    signal.signal(signal.SIGTERM, _stop)
    checks = getattr(importlib.import_module(module), name)(*map(Path, given))
    with Path(file).open("a") as rows:
        rows.write(json.dumps([check.name for check in checks]) + "\n")
        rows.flush()
        for row in rows_of(checks, end):
            rows.write(line(row) + "\n")
            rows.flush()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the servers that it started end on the way out


if __name__ == "__main__":
    main()
