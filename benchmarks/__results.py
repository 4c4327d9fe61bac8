"""Where benchmarks leave their figures: results/NAME.json, with what made them."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle.environment import environment

HERE = Path(__file__).parent


def commit() -> str | None:
    """Of the sources, `-dirty` when some are not committed; what benchmarks wrote is none of them."""
    git = ["git", "-C", str(HERE.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    sources = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    return head.stdout.strip() + "-dirty" * bool(subprocess.run(sources, check=False).returncode)


def read(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of this very commit and options; none where there are no such."""
    path = HERE / "results" / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result["rows"] if (result.get("commit"), result.get("options")) == (commit(), vars(options)) else []


def committed(path: Path, options: argparse.Namespace, names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a file of results, if the options of these names are the same."""
    result = json.loads(path.read_text()) if path.exists() else {"options": {}, "rows": []}
    same = all(result["options"].get(name) == getattr(options, name) for name in names)
    return result["rows"] if same else []


def write(name: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    """Rows beside machine, versions, commit and options (seed among them)."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {
        "environment": environment(f"make bench-{name}"),
        "commit": commit(),
        "options": vars(options),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
