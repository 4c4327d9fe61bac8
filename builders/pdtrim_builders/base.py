"""What a target is: options in, files and a `TargetResult` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pdtrim_deploy.plan import Stage

Status = Literal["built", "described"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Options(_Frozen):
    """Options of every target; `stage` is by default the name of the stage folder."""

    stage: Stage | None = None


class GraphOptions(Options):
    """Options of targets made from the stage graph.

    Attributes:
        dtype: of weights, activations and KV in the engine; by default the target's own choice.
        prompts: texts for the numerics gate; by default a few of ours.
        tolerance: largest relative error the gate lets pass; by default what `numerics.TOLERANCES` says.

    """

    dtype: Literal["float32", "float16"] | None = None
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    tolerance: Annotated[float, Field(gt=0)] | None = None


class Numerics(_Frozen):
    """Errors of the engine's graph in onnxruntime (CPU) against transformers in float32, over real prompts.

    A relative error is the largest absolute error in a row (one token) over the largest absolute value in that row
    of the reference; `*_error` is the worst row of all, and what `tolerance` bounds. `kv_*` is None for decode.
    """

    tolerance: float
    prompts: int
    tokens: int
    hidden_error: float
    hidden_max_abs_error: float
    kv_error: float | None
    kv_max_abs_error: float | None


class TargetResult(_Frozen):
    """One engine, for the manifest and for `inspect`.

    Attributes:
        status: "described" when nothing but a description was asked for (`dry_run`).
        files: bytes by name within `out_dir`.
        ops: nodes of the graph by type; plugins: PLUGIN layers by op that the target's parser made.
        checked: what was verified here, one sentence each.
        run: where the engine itself has run; None when nowhere.
        limits: what a reader must know, one sentence each.
        peak_memory: bytes of the build process.
        details: what only this target has to say.

    """

    target: str
    stage: Stage
    status: Status
    dtype: str
    plan_digest: str
    files: dict[str, int] = {}
    ops: dict[str, int] = {}
    plugins: dict[str, int] = {}
    numerics: Numerics | None = None
    checked: tuple[str, ...] = ()
    run: str | None = None
    limits: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_memory: int | None = None
    details: dict[str, str | int | float | list[str]] = {}


@dataclass(frozen=True)
class Target:
    """A target by name; `build(stage_dir, out_dir, options)` fills an empty `out_dir`."""

    name: str
    options: type[Options]
    build: Callable[[Path, Path, Options], TargetResult]
