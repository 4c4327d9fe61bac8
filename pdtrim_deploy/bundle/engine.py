"""The description of a stage's engine, written by its builder, for the manifest and `inspect`. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.plan import Stage

Status = Literal["built", "described"]
RESULT = "engine.json"  # a TargetResult, in the engine's folder


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    """One engine.

    Attributes:
        status: "described" when only a description was made (`dry_run`).
        files: bytes by name within the engine's folder.
        ops: nodes of the graph by type; plugins: PLUGIN layers by op that the target's parser made.
        checked: what was verified here, one sentence each.
        run: where the engine itself has run; None when nowhere.
        limits: what a reader must know, one sentence each.
        seconds: of wall time to build it; peak_memory: bytes that the process which built it held at most.
        details: data that only this target has.

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

    @property
    def state(self) -> Literal["described", "built", "checked", "run"]:
        """Described, built, checked or run; each state includes those before it."""
        if self.status == "described":
            return "described"
        return "run" if self.run else "checked" if self.checked else "built"

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(self.files.values())
