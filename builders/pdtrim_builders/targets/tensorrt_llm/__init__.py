"""Target `tensorrt-llm`: what its users need of a stage, for the versions with engines and for those without.

tp{N}/config.json, tp{N}/rank{R}.safetensors   a TensorRT-LLM 1.2.x checkpoint, split over N GPUs
llm-api.yaml, disaggregated.yaml               1.3 and later: the HF checkpoint of the stage, served by PyTorch
hf-fp8/                                        quantised to fp8: the checkpoint that 1.3 serves instead
commands.txt                                   the commands for both
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pdtrim_builders.base import Options, Target, TargetResult
from pdtrim_builders.graph.stage import StageModel, read_stage
from pdtrim_builders.prompts import PROMPTS
from pdtrim_builders.targets.tensorrt_llm.checkpoint import check_split, write_checkpoint
from pdtrim_builders.targets.tensorrt_llm.quantised import check_quantised, write_quantised
from pdtrim_builders.targets.tensorrt_llm.serving import HF_FP8, Serving, same_layers, write_serving
from pdtrim_deploy.errors import UserError


class TensorRTLLMOptions(Options):
    """What the stage is split for, and the limits its commands state; `dtype` is by default the stage's.

    Attributes:
        versions: of TensorRT-LLM to write for; 1.3 stands for all later ones too.
        quantisation: of linear weights and their inputs, by modelopt; the rest is then bfloat16, or the `dtype` given.
        prompts: texts to calibrate on; by default a few of ours.
    """

    versions: Annotated[tuple[Literal["1.2", "1.3"], ...], Field(min_length=1)] = ("1.2", "1.3")
    quantisation: Literal["none", "fp8", "int8"] = "none"
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tensor_parallel: Annotated[tuple[Literal[1, 2, 4, 8], ...], Field(min_length=1)] = (1,)
    max_batch_size: Annotated[int, Field(ge=1)] = 64
    max_input_len: Annotated[int, Field(ge=1)] = 4096
    max_seq_len: Annotated[int, Field(ge=2)] = 8192
    transceiver: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE"] = "NIXL"
    prefill_port: Annotated[int, Field(ge=1, le=65535)] = 8001
    decode_port: Annotated[int, Field(ge=1, le=65535)] = 8002
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    dry_run: bool = False


def build(stage_dir: Path, out_dir: Path, options: Options) -> TargetResult:
    """Write the checkpoints, the YAML and the commands."""
    assert isinstance(options, TensorRTLLMOptions)
    stage = read_stage(stage_dir, options.stage)
    sizes = tuple(dict.fromkeys(options.tensor_parallel))
    for size in sizes:
        check_split(stage, size)
    dtype, quantised = _dtype(stage, options), options.quantisation != "none"
    if quantised:
        check_quantised(stage, sizes)
    serving = Serving(**options.model_dump(include=set(Serving.__dataclass_fields__)))
    measured: dict[str, float | int] = {}
    if not options.dry_run:
        splits = sizes if "1.2" in options.versions else ()
        if quantised:
            measured = write_quantised(stage, out_dir, dtype, splits, options.quantisation, options.prompts or PROMPTS)
        else:
            for size in splits:
                write_checkpoint(stage, out_dir / f"tp{size}", dtype, size)
        write_serving(stage, out_dir, dtype, sizes, serving, fp8=options.quantisation == "fp8")
    limits = [
        "neither TensorRT-LLM nor any command was run here; 1.2.x is the last with engines, later ones use PyTorch",
        "TensorRT-LLM sends the whole prompt's KV in every layer: the plan's KV rules have no effect there",
    ]
    if not same_layers(stage):
        limits.append(
            "its transceiver pairs layers by number and the stages differ in layers: in disaggregated.yaml's set-up "
            "both servers run the decode model"
        )
    if options.quantisation == "fp8" and "1.3" in options.versions:
        limits.append(f"{HF_FP8} is for serving engines: plain transformers takes its codes for weights")
    if options.quantisation == "int8" and "1.3" in options.versions:
        limits.append("int8 is written for 1.2 only: the 1.3 commands serve the stage's own checkpoint, not quantised")
    return TargetResult(
        target=TARGET.name,
        stage=stage.stage,
        status="described" if options.dry_run else "built",
        dtype=dtype,
        plan_digest=stage.plan.digest,
        checked=("quantised weights, simulated in torch: loss on the calibration text, in details",)
        if measured
        else (),
        limits=tuple(limits),
        details={
            "tensor_parallel": [str(size) for size in sizes],
            "versions": list(options.versions),
            "quantisation": options.quantisation,
            **measured,
        },
    )


def _dtype(stage: StageModel, options: TensorRTLLMOptions) -> str:
    dtype = options.dtype or str(stage.config.get("dtype") or stage.config.get("torch_dtype"))
    if options.quantisation == "none" or dtype != "float32":
        return dtype
    if options.dtype == "float32":
        raise UserError("quantisation needs a dtype of 16 bits around it, float16 or bfloat16, not float32")
    return "bfloat16"


TARGET = Target("tensorrt-llm", TensorRTLLMOptions, build)
