"""The interface of targets: options in, files and a `TargetResult` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pdtrim_deploy.bundle.engine import Numerics, TargetResult
from pdtrim_deploy.plan import Stage

__all__ = ["GraphOptions", "Numerics", "Options", "Target", "TargetResult"]


class Options(BaseModel):
    """Options of every target; `stage` is by default the name of the stage folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Stage | None = None


class GraphOptions(Options):
    """Options of targets made from the stage graph.

    Attributes:
        prompts: texts for the numerics check; by default those of `prompts.py`.
        tolerance: largest relative error that the numerics check accepts; by default that of `numerics.TOLERANCES`.

    """

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    tolerance: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Target:
    """A target by name; `build(stage_dir, out_dir, options)` fills an empty `out_dir`."""

    name: str
    options: type[Options]
    build: Callable[[Path, Path, Options], TargetResult]
