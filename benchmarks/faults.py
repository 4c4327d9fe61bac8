"""What faults do to a running pair's requests -> results/faults.json. `make bench-faults`.

Runs tests/faults, which judge every fault, and keeps their table; fails when one of them does. Each row has the commit
and the processor of its own run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from __results import HERE, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak-requests", type=int, default=2000)
    parser.add_argument("--serve-python", type=Path, help="a Python with SGLang and the libraries of all transports")
    parser.add_argument("--tables", type=Path, nargs="*", help="tables of earlier runs of the tests, instead of a run")
    parser.add_argument("--keep", action="store_true", help="keep committed rows of faults that this run has none of")
    options = parser.parse_args()
    failed, tables = 0, options.tables or []
    with tempfile.TemporaryDirectory() as folder:
        if not tables:
            tables = [Path(folder) / "faults.json"]
            command = [sys.executable, "-m", "pytest", HERE.parent / "tests" / "faults", "--faults-out", tables[0]]
            command += ["--soak-requests", str(options.soak_requests)]
            command += ["--serve-python", options.serve_python] if options.serve_python else []
            failed = subprocess.run(command, check=False).returncode
        latest = {identity(row): row for table in tables for row in json.loads(table.read_text())}
        rows = list(latest.values())
    if options.keep:
        new = {identity(row) for row in rows}
        old = json.loads((HERE / "results" / "faults.json").read_text())["rows"]
        rows = [row for row in old if identity(row) not in new] + rows
    options.tables = options.serve_python = None  # places of this machine
    print(write("faults", options, rows))
    raise SystemExit(failed)


def identity(row: dict[str, object]) -> tuple[object, ...]:
    """What a row is of."""
    return row["path"], row["transport"], row["fault"]


if __name__ == "__main__":
    main()
