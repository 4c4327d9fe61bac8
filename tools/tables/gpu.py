"""What has run on a GPU: from the committed gpu-check.json, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.base import table

Data = dict[str, Any]
HOW = "`make gpu-check` runs there, in ten minutes, what the machine allows"

# By part of the limits' list: how the names of the rows begin that run it; none: no row does.
PREFIXES: dict[str, tuple[str, ...]] = {
    "pruning, oracle": ("oracle",),
    "pack / unpack in Triton": ("kernels",),
    "decode attention of cut layers, with CUDA graphs and without": ("served", "attention", "no-graphs"),
    "a served pair of a real model": ("smollm2", "SmolLM2"),
    "time between tokens beside the dense plan": ("itl", "ITL"),
    "transfer through NIXL": ("nixl",),
    "transfer through Mooncake": ("mooncake",),
    "TensorRT engines, executor tensorrt": ("tensorrt", "TensorRT"),
    "KV-only layers under prefill's CUDA graphs": ("plans", "KV-only layers"),
    "sublayers": ("plans", "sublayers"),
    "key offsets": ("plans", "key offsets"),
    "unequal TP, copied heads, DP attention": ("ranks",),
    "fp8 KV pools": ("fp8-pool", "fp8 pool"),
    "sliding windows": ("windows",),
    "latents (MLA)": ("latents",),
    "speculation without cut layers": ("speculation",),
    "hierarchical cache on prefill": ("cache", "hierarchical cache"),
    "CUDA kernel of the pack": ("cuda-pack", "CUDA pack"),
    "FP8 weights, HiCache on decode, onnx and RTX targets, manifests": (),
}


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


def gpucolumn(check: Data | None) -> str:
    """Part by part, whether it ran on a GPU: by the prefixes of its rows in gpu-check.json."""
    rows = check["rows"] if check is not None and _ran(check) else []
    lines = [
        (
            part,
            _state([row for row in rows if row["part"].startswith(prefixes)]) if prefixes else "no: nothing checks it",
        )
        for part, prefixes in PREFIXES.items()
    ]
    return table(("part", "run on a GPU"), lines)


def _state(rows: list[Data]) -> str:
    """Of the rows of a part; no row, or only skipped ones: it has not run."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("run", "failed", "skipped")}
    if not counts["run"] + counts["failed"]:
        return "no" + (f" ({rows[0]['reason']})" if rows else "")
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


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
