"""The recipe's `targets`: which engines of both stages are built, and how. Mirrors the builders' options.

A key requests its target; `onnx:` alone requests it with all defaults. A test checks each section against the options
of the builder of the same name, which the core does not import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_serializer, model_validator

from pdtrim_deploy.recipe.section import Section

Port = Annotated[int, Field(ge=1, le=65535)]
# Not strict: YAML has lists where we keep tuples, reads 5e-5 as text, and 8.9 as a number.
Tolerance = Annotated[float, Field(gt=0, strict=False)]
_AS_TEXT = BeforeValidator(lambda value: str(value) if isinstance(value, float) else value)
ComputeCapability = Annotated[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], _AS_TEXT]
Version = Annotated[Literal["1.2", "1.3"], _AS_TEXT]
Quantisation = Literal["none", "fp8", "int8"]


class Target(Section):
    """Options of one target."""

    @property
    def calibrates(self) -> bool:
        """Whether building needs the calibration text."""
        return False

    @property
    def reads(self) -> Path | None:
        """A file whose bytes go into the engine."""
        return None


class OnnxTarget(Target):
    """The stage graph for onnxruntime on the CPU.

    `weights` int8 quantises the linear weights, `dtype` is by default the stage's; `tolerance` is the largest relative
    error that the numerics check accepts.
    """

    dtype: Literal["float32", "float16"] | None = None
    weights: Literal["native", "int8"] = "native"
    tolerance: Tolerance | None = None


class TensorRTTarget(Target):
    """A TensorRT engine, for the GPU of the machine that builds; tuned for calls of `usual_tokens` tokens.

    `dtype` is by default the stage's, or float16 where that is float32.

    `plugin_library` is a path to libpdtrim_tensorrt.so, which the engine then contains; `dry_run` only describes the
    engine.
    """

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tolerance: Tolerance | None = None
    most_tokens: PositiveInt = 4096
    usual_tokens: PositiveInt = 256
    plugin_library: str | None = None
    dry_run: bool = False

    @property
    def reads(self) -> Path | None:
        """The plugin library."""
        return Path(self.plugin_library) if self.plugin_library else None

    @model_validator(mode="after")
    def _tokens(self) -> TensorRTTarget:
        if self.usual_tokens > self.most_tokens:
            raise ValueError(
                f"usual_tokens is {self.usual_tokens}; allowed: at most most_tokens, which is {self.most_tokens}"
            )
        return self


class TensorRTRTXTarget(TensorRTTarget):
    """A TensorRT for RTX engine: builds without a GPU, for the `compute_capabilities` listed."""

    compute_capabilities: Annotated[tuple[ComputeCapability, ...], Field(min_length=1, strict=False)] = (
        "8.0",
        "8.6",
        "8.9",
        "12.0",
    )


class TensorRTLLMTarget(Target):
    """TensorRT-LLM: a checkpoint and build command for 1.2, YAML and commands for 1.3 and later.

    `tensor_parallel` lists the splits to write; `quantisation` is modelopt's, calibrated on the calibration text.
    """

    versions: Annotated[tuple[Version, ...], Field(min_length=1, strict=False)] = ("1.2", "1.3")
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    quantisation: Quantisation = "none"
    tensor_parallel: Annotated[tuple[Literal[1, 2, 4, 8], ...], Field(min_length=1, strict=False)] = (1,)
    max_batch_size: PositiveInt = 64
    max_input_len: PositiveInt = 4096
    max_seq_len: Annotated[int, Field(ge=2)] = 8192
    transceiver: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE"] = "NIXL"
    prefill_port: Port = 8001
    decode_port: Port = 8002
    port: Port = 8000
    dry_run: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether it quantises, and so needs the calibration text."""
        return self.quantisation != "none" and not self.dry_run


class TargetsSection(Section):
    """Engines to build of each stage, by target."""

    onnx: OnnxTarget | None = None
    tensorrt_rtx: Annotated[TensorRTRTXTarget | None, Field(alias="tensorrt-rtx")] = None
    tensorrt: TensorRTTarget | None = None
    tensorrt_llm: Annotated[TensorRTLLMTarget | None, Field(alias="tensorrt-llm")] = None

    @model_validator(mode="before")
    @classmethod
    def _asked_for(cls, data: Any) -> Any:
        return {k: {} if v is None else v for k, v in data.items()} if isinstance(data, dict) else data

    @model_serializer
    def _dump(self) -> dict[str, dict[str, Any]]:
        return {name: section.model_dump(mode="json") for name, section in self.requested.items()}

    @property
    def requested(self) -> dict[str, Target]:
        """The requested targets by name, in the order of the fields above."""
        sections = {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items()}
        return {name: section for name, section in sections.items() if section is not None}


TARGETS: tuple[str, ...] = tuple(field.alias or name for name, field in TargetsSection.model_fields.items())
