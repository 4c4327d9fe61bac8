"""The commands that README and docs show, and how each is tried (tests/docs/commands.yaml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
HOW: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "docs" / "commands.yaml").read_text())
OTHERS = ("curl", "kubectl", "python")  # programs that are not ours
WRITTEN = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "deploy" / "README.md"]
    if "reference" not in path.parts
)


def commands(text: str) -> list[str]:
    """Commands, ours and of OTHERS: lines of code blocks, with their continuations, and inline code."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    shown = [re.sub(r"^(\$ |\.venv/build/bin/)", "", line) for line in [*lines, *inline]]
    return [line for line in shown if re.match(rf"({'|'.join(['pdtrim-deploy', 'make', *OTHERS])}) [a-z-]", line)]


def bare(line: str) -> str:
    """Less comments, redirections and pictures, single spaces: a key of HOW."""
    return re.split(r" [>;#]|  +", line.replace("\\|", "|"))[0].strip()


def shown() -> list[tuple[str, str]]:
    """(file, line) of all of them."""
    return [(str(p.relative_to(ROOT)), line) for p in WRITTEN for line in dict.fromkeys(commands(p.read_text()))]


def how(line: str) -> dict[str, Any] | None:
    """How a line that is shown is tried; None when nobody has said."""
    bench = re.fullmatch(r"make bench-([a-z]+)", bare(line))
    return {"bench": bench[1]} if bench else HOW.get(bare(line))


def to_run() -> dict[str, set[int]]:
    """Commands that tests/cli/test_shown.py runs, and the exit codes allowed."""
    exit_codes: dict[str, set[int]] = {}
    for line, how in HOW.items():
        if "run" in how:
            command = line if how["run"] is True else how["run"]
            exit_codes[command] = {0, *how.get("codes", ())} | exit_codes.get(command, set())
    return exit_codes
