"""Target `onnx`: the stage graph itself, for onnxruntime on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from pdtrim_builders.base import GraphOptions, Options, Target, TargetResult
from pdtrim_builders.graph.build import EXTERNAL_ABOVE, build_graph
from pdtrim_builders.graph.stage import StageModel, read_stage
from pdtrim_builders.numerics import TOLERANCES, check_numerics, is_large
from pdtrim_deploy.errors import UserError

GRAPH = "model.onnx"


class OnnxOptions(GraphOptions):
    """Options of a graph for onnxruntime.

    Attributes:
        dtype: of weights, activations and KV; by default the stage's. The CPU's kernels lack bfloat16.
        weights: "native" keeps the graph's dtype, "int8" quantises linear weights for the CPU.
        external_above: bytes of weights from which on they lie in a file of their own.

    """

    dtype: Literal["float32", "float16"] | None = None
    weights: Literal["native", "int8"] = "native"
    external_above: int = EXTERNAL_ABOVE


def build(stage_dir: Path, out_dir: Path, options: Options) -> TargetResult:
    """Write `model.onnx` (and `model.onnx.data`), then compare it with torch."""
    assert isinstance(options, OnnxOptions)
    stage = read_stage(stage_dir, options.stage)
    dtype = options.dtype or native_dtype(stage)
    if options.weights == "int8" and dtype != "float32":
        raise UserError(f"int8 weights need dtype float32 around them, not {dtype}")
    tolerance = options.tolerance or TOLERANCES[dtype]
    if options.weights == "int8":
        from pdtrim_builders.quantise import quantise_weights

        with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
            graph = build_graph(stage, Path(scratch) / GRAPH, dtype, external_above=options.external_above)
            check_numerics(
                stage, graph.path, TOLERANCES[dtype], options.prompts
            )  # the error of int8 weights is not checked here
            counts = quantise_weights(graph.path, out_dir / GRAPH)
        tolerance = options.tolerance or TOLERANCES["int8"]
    else:
        counts = build_graph(stage, out_dir / GRAPH, dtype, external_above=options.external_above).op_counts
    numerics = check_numerics(stage, out_dir / GRAPH, tolerance, options.prompts)
    limits = [] if dtype == "float32" else ["executor onnxruntime runs float32 graphs: this one is for other engines"]
    if options.weights == "int8":
        limits.append("int8 weights change logprobs by more than the fidelity check accepts")
    if is_large(out_dir / GRAPH):
        limits.append("it was checked as written, without onnxruntime's optimisations")
    return TargetResult(
        target=TARGET.name,
        stage=stage.stage,
        status="built",
        dtype=dtype,
        plan_digest=stage.plan.digest,
        ops=counts,
        numerics=numerics,
        checked=("graph by onnx's checker", compared(stage, dtype)),
        run="onnxruntime, CPU, in the numerics check",
        limits=(*limits, *window_limits(stage), *wire_limits(stage, dtype), *codec_limits(stage)),
        details={"weights": options.weights},
    )


def native_dtype(stage: StageModel) -> Literal["float32", "float16"]:
    """The stage's own dtype; UserError for bfloat16, which onnxruntime's MatMul does not have on the CPU."""
    dtype = stage.dtype
    if dtype == "float32":
        return "float32"
    if dtype == "float16":
        return "float16"
    raise UserError(
        f"onnxruntime has no kernels for dtype {dtype} on the CPU; give option dtype, float32 or float16, or build "
        "target tensorrt or tensorrt-rtx, which have bfloat16"
    )


def compared(stage: StageModel, dtype: str) -> str:
    """The quantities that the numerics check compared."""
    what = "hidden states and packed KV" if stage.sends else "hidden states"
    how = ", its bfloat16 weights widened," if dtype == "bfloat16" else ""
    return f"{what} of the graph in onnxruntime{how} against transformers in float32"


def wire_limits(stage: StageModel, dtype: str) -> tuple[str, ...]:
    """The limit to report if the engine's KV dtype differs from that of the plan's pool and wire."""
    pool = stage.plan.model.kv_dtype
    if dtype == pool:
        return ()
    return (f"its KV is {dtype}, the plan's pool and wire hold {pool}: serve it from a bundle of model.dtype {dtype}",)


def window_limits(stage: StageModel) -> tuple[str, ...]:
    """The limit to report if the model has sliding windows, which neither graph nor SGLang support."""
    window = stage.window
    return (
        () if window is None else (f"its attention has no sliding window: it matches the model up to {window} tokens",)
    )


def codec_limits(stage: StageModel) -> tuple[str, ...]:
    """The limit to report if rows leave the graph unquantised although the plan quantises them."""
    wires = sorted({rule.send.wire_dtype for rule in stage.sends} - {"native"})
    if not wires:
        return ()
    return (f"layers of wire dtype {', '.join(wires)} leave this graph as plain rows: the executor encodes them",)


TARGET = Target("onnx", OnnxOptions, build)
