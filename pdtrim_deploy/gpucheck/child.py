"""The process of one part, `python -m pdtrim_deploy.gpucheck.child MODULE:FUNCTION FILE [PYTHON]`: rows go into FILE.

PYTHON is SGLang's, and the function's only argument.
"""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from types import FrameType

from pdtrim_deploy.gpucheck.base import line


def main() -> None:
    """Each row is written as soon as it is there: what ran before a crash is kept."""
    function, file, *given = sys.argv[1:]
    module, _, name = function.partition(":")
    signal.signal(signal.SIGTERM, _stop)
    with Path(file).open("a") as rows:
        for row in getattr(importlib.import_module(module), name)(*map(Path, given)):
            rows.write(line(row) + "\n")
            rows.flush()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the servers that it started end on the way out


if __name__ == "__main__":
    main()
