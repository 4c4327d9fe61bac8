"""What has run on a GPU: from the committed gpu-check.json, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tables.base import table

Data = dict[str, Any]
HOW = "On a GPU machine `make gpu-check` runs, in ten minutes, the parts that the machine allows"


class Rows(NamedTuple):
    """Rows of the file that say of a subject whether it ran.

    Attributes:
        parts: of the check, each a row of its own where the whole part was skipped.
        checks: how the names of its checks begin.

    """

    parts: tuple[str, ...]
    checks: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether a row of this name is among them."""
        return name in self.parts or name.startswith(self.checks)


SUBJECTS = {
    "pruning, oracle": Rows(("oracle",), ("oracle:",)),
    "`build --device`": Rows(("build",), ("build:",)),
    "pack / unpack in Triton": Rows(("kernels",), ("kernels:",)),
    "decode attention of cut layers, with CUDA graphs and without": Rows(("served", "no-graphs"), ("attention:",)),
    "a served pair of a real model": Rows(("smollm2",), ("SmolLM2",)),
    "time between tokens beside SGLang without the plugin": Rows(("itl",), ("ITL:",)),
    "transfer through NIXL": Rows(("nixl",), ("nixl:",)),
    "transfer through Mooncake": Rows(("mooncake",), ("mooncake:",)),
    "TensorRT engines, executor tensorrt": Rows(("tensorrt",), ("TensorRT:",)),
    "workers with the sizes that SGLang chooses": Rows(("workers",), ("workers: sizes",)),
    "pages of 16 tokens": Rows(("workers",), ("workers: pages",)),
    "rows sent by layer": Rows(("workers",), ("workers: rows",)),
    "KV-only layers under prefill's CUDA graphs": Rows(("plans",), ("KV-only layers:",)),
    "KV-only layers with a tail": Rows(("plans",), ("KV-only tail",)),
    "sublayers": Rows(("plans",), ("sublayers",)),
    "key offsets": Rows(("plans",), ("key offsets:",)),
    "mixtures with fewer experts": Rows(("plans",), ("experts:",)),
    "bfloat16 mixtures with cut layers": Rows(("plans",), ("bfloat16:",)),
    "float32": Rows(("plans",), ("float32:",)),
    "unequal TP, copied heads, DP attention": Rows(("ranks",), ("ranks:",)),
    "fp8 KV pools": Rows(("fp8-pool",), ("fp8 pool:",)),
    "FP8 weights": Rows(("fp8-weights",), ("FP8 weights:",)),
    "sliding windows": Rows(("windows",), ("windows:",)),
    "latents (MLA)": Rows(("latents",), ("latents:",)),
    "states of linear attention": Rows(("states",), ("states:",)),
    "speculation without cut layers": Rows(("speculation",), ("speculation:",)),
    "hierarchical cache on prefill": Rows(("cache",), ("hierarchical cache on prefill",)),
    "radix cache on decode": Rows(("cache",), ("radix cache on decode",)),
    "hierarchical cache on decode": Rows(("cache",), ("hierarchical cache on decode",)),
    "CUDA kernel of the pack": Rows(("cuda-pack",), ("CUDA pack:",)),
}
# What no row can run, and why.
NOT_OF_A_GPU = {
    "targets onnx and tensorrt-rtx": "onnxruntime computes on the CPU; no executor runs engines of RTX",
    "target tensorrt-llm": "our workers run none of its checkpoints",
    "Kubernetes, Compose, Dockerfile": "they need a cluster, Docker and a network; a pair of the same options: workers",
    "Ray workers of the search": "their students were not tried on several GPUs",
}


def gpu(check: Data | None) -> str:
    """One sentence for the README."""
    if not _ran(check):
        return f"**Nothing has run on a GPU.** {HOW}."
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
    """Part by part, whether it ran on a GPU: by its rows in gpu-check.json; and what no row can run."""
    rows = check["rows"] if check is not None and _ran(check) else []
    lines = [(name, _state([row for row in rows if of.has(row["part"])])) for name, of in SUBJECTS.items()]
    lines += [(name, f"no: {why}") for name, why in NOT_OF_A_GPU.items()]
    return table(("part", "run on a GPU"), lines)


def ran(check: Data | None, subject: str) -> str:
    """Within a sentence, whether a subject ran: "**not run on a GPU**", "run on a GPU (2 failed of 5)".

    Raises:
        KeyError: there is no such subject.

    """
    of = SUBJECTS[subject]
    rows = [row for row in check["rows"] if of.has(row["part"])] if check is not None and _ran(check) else []
    counts = {status: sum(row["status"] == status for row in rows) for status in ("run", "failed")}
    total = sum(counts.values())
    if not total:
        return "**not run on a GPU**"
    return "run on a GPU" + (f" (**{counts['failed']} failed** of {total})" if counts["failed"] else "")


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
