"""Where benchmarks leave their figures: results/NAME.json, with what made them."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle.environment import environment

HERE = Path(__file__).parent


def commit() -> str | None:
    """Of the sources, `-dirty` when some are not committed; what benchmarks wrote is none of them."""
    git = ["git", "-C", str(HERE.parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    sources = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    return found.stdout.strip() + "-dirty" * bool(subprocess.run(sources, check=False).returncode)


def read(name: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of this very commit and options; none where there are no such."""
    path = HERE / "results" / f"{name}.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    return made["rows"] if (made.get("commit"), made.get("options")) == (commit(), vars(asked)) else []


def write(name: str, asked: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    """Rows beside machine, versions, commit and options (seed among them)."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    made = {"environment": environment(f"make bench-{name}"), "commit": commit(), "options": vars(asked), "rows": rows}
    path.write_text(json.dumps(made, indent=1) + "\n")
    return path
