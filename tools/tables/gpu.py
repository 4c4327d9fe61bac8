"""What has run on a GPU: from the committed gpu-check.json, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.base import table

Data = dict[str, Any]
HOW = "`make gpu-check` runs there, in ten minutes, what the machine allows"


def gpu(check: Data | None) -> str:
    """One sentence for the README."""
    if not _ran(check):
        return f"**Nothing has run on a GPU.** {HOW}, and writes it down."
    assert check is not None
    counts = {status: sum(row["status"] == status for row in check["rows"]) for status in ("run", "failed", "skipped")}
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    return (
        f"On {_where(check)}: {counts['run']} checks run{failed}, {counts['skipped']} skipped "
        f"([each](docs/explanation/limits.md#on-a-gpu)). {HOW}."
    )


def gpuparts(check: Data | None) -> str:
    """Every row, with its reason or figures."""
    if not _ran(check):
        return f"Nothing has run on a GPU: no `gpu-check.json` of one is committed. {HOW}."
    assert check is not None
    rows = [(row["part"], row["status"], row["reason"] or _figures(row["figure"] or {})) for row in check["rows"]]
    return f"{table(('part', 'status', 'reason or figures'), rows)}\n\n`{check['command']}` on {_where(check)}."


def _ran(check: Data | None) -> bool:
    """A file of a machine without a GPU, or in which nothing ran, says nothing."""
    return bool(check and check["device"] and any(row["status"] != "skipped" for row in check["rows"]))


def _where(check: Data) -> str:
    versions = check["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "triton", "sglang", "tensorrt") if versions.get(name)]
    device = check["device"]
    return ", ".join([f"{device['count']} {device['name']}", f"driver {check['driver'] or 'unknown'}", *named])


def _figures(figure: Mapping[str, float | int | str]) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in figure.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
