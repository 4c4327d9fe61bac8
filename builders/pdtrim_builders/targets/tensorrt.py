"""Targets `tensorrt-rtx` (TensorRT for RTX, builds without a GPU) and `tensorrt` (data centre, needs one): one path.

The engine is the stage graph with both ops of domain `pdtrim` as plugins; see `pdtrim_builders.graph.build` for its
inputs and outputs, and `pdtrim_tensorrt` for what runs the plugins.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pdtrim_builders.base import GraphOptions, Options, Target, TargetResult
from pdtrim_builders.graph.build import build_graph
from pdtrim_builders.graph.stage import StageModel, read_stage
from pdtrim_builders.numerics import TOLERANCES, check_numerics
from pdtrim_builders.targets.onnx import compared, window_limits, wire_limits
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import run_job

PLAN = "engine.plan"
logger = logging.getLogger(__name__)
NOT_RUN = "the engine has never been run: loading, inspecting and executing one needs a GPU"


class TensorRTOptions(GraphOptions):
    """Options of a TensorRT engine.

    Attributes:
        dtype: of weights, activations and KV; by default the stage's, or float16 for a stage in float32.
        most_tokens, usual_tokens: largest number of tokens of one call (T), and the number that it is tuned for.
        plugin_library: libpdtrim_tensorrt.so, which the engine then contains; without it the engine is built with the
            Python forms, and the process that runs it must load the library.
        dry_run: only describe the engine.
    """

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    most_tokens: Annotated[int, Field(ge=1)] = 4096
    usual_tokens: Annotated[int, Field(ge=1)] = 256
    plugin_library: Path | None = None
    dry_run: bool = False


class RTXOptions(TensorRTOptions):
    """`compute_capabilities`: GPU generations the engine runs on, as "8.9"."""

    compute_capabilities: Annotated[tuple[str, ...], Field(min_length=1)] = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class Flavour:
    """Differences between the two TensorRTs; `magic`: first bytes of a plan file (None: unknown)."""

    name: str
    module: str
    install: str
    magic: str | None
    limits: tuple[str, ...]
    capabilities: tuple[str, ...] = ()


def build(flavour: Flavour, stage_dir: Path, out_dir: Path, options: TensorRTOptions) -> TargetResult:
    """Write `engine.plan`: the graph, its numerics check, then TensorRT in a process of its own."""
    stage = read_stage(stage_dir, options.stage)
    dtype = options.dtype or ("bfloat16" if stage.dtype == "bfloat16" else "float16")
    capabilities = _capabilities(flavour, options)
    _check(stage, options)
    plugins = stage.custom_nodes
    described = TargetResult(
        target=flavour.name,
        stage=stage.stage,
        status="described",
        dtype=dtype,
        plan_digest=stage.plan.digest,
        plugins=plugins,
        limits=(
            NOT_RUN,
            *flavour.limits,
            *_plugin_limits(options),
            *window_limits(stage),
            *wire_limits(stage, dtype),
        ),
        details={
            "compute_capabilities": list(getattr(options, "compute_capabilities", ("the GPU at hand",))),
            "most_tokens": options.most_tokens,
            "tokens": f"1 to {options.most_tokens}, tuned for {options.usual_tokens}",
            "plugin_library": str(options.plugin_library.name) if options.plugin_library else "Python forms",
        },
    )
    if options.dry_run:
        steps = [
            f"write the {dtype} graph of {stage.layers} layers of {stage.architecture}",
            f"check it in onnxruntime against transformers (tolerance {options.tolerance or TOLERANCES[dtype]:g})",
            f"parse it with {flavour.module} in a process of its own and count {sum(plugins.values())} PLUGIN layers",
            f"build and check {PLAN}",
        ]
        return described.model_copy(update={"details": described.details | {"would": steps}})
    require(flavour)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        scratch = Path(folder)
        plain = build_graph(stage, scratch / "model.onnx", dtype)
        numerics = check_numerics(
            stage, plain.path, options.tolerance or TOLERANCES[dtype], options.prompts, dtype=dtype
        )
        if any(rule.send.wire_dtype != "native" for rule in stage.sends):
            plain = build_graph(stage, scratch / "model.onnx", dtype, encode=True)
        job = {
            "module": flavour.module,
            "graph": str(plain.path),
            "plan": str(out_dir / PLAN),
            "plugin_library": str(options.plugin_library.absolute()) if options.plugin_library else None,
            "plugins": plugins,
            "compute_capabilities": capabilities,
            "usual_tokens": options.usual_tokens,
            "most_tokens": options.most_tokens,
            "magic": flavour.magic,
        }
        logger.info("waiting for %s, which parses the graph and builds the engine", flavour.module)
        command = [sys.executable, "-m", "pdtrim_builders.targets.tensorrt_worker"]
        done = run_job(command, job, scratch, _environment(flavour, scratch))
    answer = done.answer
    return described.model_copy(
        update={
            "status": "built",
            "ops": {op: count for op, count in plain.op_counts.items() if count},
            "plugins": answer["plugins"],
            "numerics": numerics,
            "peak_memory": done.peak_memory,
            "checked": (
                f"{compared(stage, dtype)}, for the graph and not for the engine",
                "every custom node is a PLUGIN layer after the parse; the plan file begins as an engine does and "
                "names its plugins: this shows that they are there, not that they are right",
            ),
            "details": described.details
            | {"version": answer["version"], "layers": answer["layers"], "process_seconds": done.seconds}
            | {key: answer[key] for key in ("inputs", "outputs", "parse_seconds", "build_seconds", "aux_streams")},
        }
    )


def require(flavour: Flavour) -> None:
    """UserError unless the library is there and, for the data centre's, a GPU."""
    if importlib.util.find_spec(flavour.module) is None:
        raise UserError(f"Python package {flavour.module} is not installed; run: {flavour.install}")
    if not flavour.capabilities and not has_gpu():
        raise UserError("TensorRT builds for the GPU at hand and there is none; run on a GPU host, or with dry_run")


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    smi = shutil.which("nvidia-smi")
    return bool(smi and b"GPU" in subprocess.run([smi, "-L"], check=False, capture_output=True).stdout)


def _capabilities(flavour: Flavour, options: TensorRTOptions) -> list[str]:
    """Names in TensorRT's enumeration, as SM89."""
    capabilities = options.compute_capabilities if isinstance(options, RTXOptions) else ()
    odd = [capability for capability in capabilities if capability not in flavour.capabilities]
    if odd:
        raise UserError(f"compute capability {odd[0]} is not supported; use some of {', '.join(flavour.capabilities)}")
    return [f"SM{capability.replace('.', '')}" for capability in capabilities]


def _check(stage: StageModel, options: TensorRTOptions) -> None:
    if options.usual_tokens > options.most_tokens:
        raise UserError(f"usual_tokens {options.usual_tokens} is above most_tokens {options.most_tokens}")
    if options.plugin_library is not None and not options.plugin_library.is_file():
        raise UserError(f"{options.plugin_library}: no such plugin library; build it with CMake, or leave it out")
    from pdtrim_tensorrt.kernel import KERNEL_WIRE_DTYPES

    odd = Counter(rule.send.wire_dtype for rule in stage.sends if rule.send.wire_dtype not in KERNEL_WIRE_DTYPES)
    for wire, layers in odd.items():
        raise UserError(
            f"SparseKVSend does not support wire dtype {wire}, which {layers} layers of the plan use; "
            f"choose one of {', '.join(KERNEL_WIRE_DTYPES)}"
        )


def _plugin_limits(options: TensorRTOptions) -> tuple[str, ...]:
    if options.plugin_library:
        return ()
    return ("built with the plugins' Python forms: load libpdtrim_tensorrt.so into the process that runs it",)


def _environment(flavour: Flavour, scratch: Path) -> Mapping[str, str]:
    if flavour.module != "tensorrt_rtx":
        return os.environ
    from pdtrim_tensorrt.rtx_libraries import rtx_environment

    return rtx_environment(scratch / "libraries")


def _target(flavour: Flavour, kind: type[TensorRTOptions]) -> Target:
    def run(stage_dir: Path, out_dir: Path, options: Options) -> TargetResult:
        assert isinstance(options, kind)
        return build(flavour, stage_dir, out_dir, options)

    return Target(flavour.name, kind, run)


RTX_FLAVOUR = Flavour(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "pip install tensorrt-rtx==1.7.1.116",
    "vtrt",
    ("TensorRT for RTX has no engines for Hopper (9.0) and data-centre Blackwell (10.0)",),
    ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
)
RTX = _target(RTX_FLAVOUR, RTXOptions)
DATA_CENTRE = _target(
    Flavour("tensorrt", "tensorrt", "pip install tensorrt (on a GPU host)", None, ()), TensorRTOptions
)
