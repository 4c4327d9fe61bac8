"""`python -m pdtrim_deploy.gpucheck`: the check where click and the rest of the toolkit are not installed."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.check import BUDGET_S
from pdtrim_deploy.gpucheck.command import run
from pdtrim_deploy.gpucheck.registry import PARTS


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m pdtrim_deploy.gpucheck", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--part", action="append", default=[], help=", ".join(PARTS))
    parser.add_argument("--serve-python", type=Path)
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    options = parser.parse_args()
    typed = shlex.join(["python", "-m", "pdtrim_deploy.gpucheck", *sys.argv[1:]])
    try:
        return run(options.out, tuple(options.part), options.serve_python, options.seconds, typed, print)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
