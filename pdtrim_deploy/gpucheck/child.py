"""The process of a part: `python -m pdtrim_deploy.gpucheck.child MODULE:FUNCTION FILE SECONDS FIRST [PYTHON FOLDER]`.

Its checks' names go into FILE, then a row of each from number FIRST on. PYTHON is SGLang's, and FOLDER is for what the
part builds: the function's arguments, where they are there.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from pdtrim_deploy.gpucheck.base import DEVICE_LOST, add_plugins, line
from pdtrim_deploy.gpucheck.checks import rows_of


def main() -> None:
    """Each row is written as soon as it is there: what ran before a crash is kept."""
    function, file, seconds, first, *arguments = sys.argv[1:]
    end = time.monotonic() + float(seconds)
    module, _, name = function.partition(":")
    signal.signal(signal.SIGTERM, _stop)
    add_plugins()
    checks = getattr(importlib.import_module(module), name)(*map(Path, arguments))
    with Path(file).open("a") as rows:
        rows.write(json.dumps([check.name for check in checks]) + "\n")
        rows.flush()
        for row in rows_of(checks[int(first) :], end):
            rows.write(line(row) + "\n")
            rows.flush()
            if row.status == "failed" and _device_lost():
                raise SystemExit(DEVICE_LOST)


def _device_lost() -> bool:
    """Whether this process can do nothing more on its GPU, as after an illegal memory access: another one can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the servers that it started end on the way out


if __name__ == "__main__":
    main()
