"""Targets by name, and the function that builds one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pdtrim_builders.base import Options, Target, TargetResult
from pdtrim_deploy.bundle.engine import RESULT
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import atomic_directory


def _onnx() -> Target:
    from pdtrim_builders.targets.onnx import TARGET

    return TARGET


def _tensorrt_rtx() -> Target:
    from pdtrim_builders.targets.tensorrt import RTX

    return RTX


def _tensorrt() -> Target:
    from pdtrim_builders.targets.tensorrt import DATA_CENTRE

    return DATA_CENTRE


def _tensorrt_llm() -> Target:
    from pdtrim_builders.targets.tensorrt_llm import TARGET

    return TARGET


TARGETS: dict[str, Callable[[], Target]] = {
    "onnx": _onnx,
    "tensorrt-rtx": _tensorrt_rtx,
    "tensorrt": _tensorrt,
    "tensorrt-llm": _tensorrt_llm,
}


def get_target(name: str) -> Target:
    """The target of that name; UserError with the valid names."""
    if name not in TARGETS:
        raise UserError(f"target {name!r} is unknown; use one of {', '.join(TARGETS)}")
    try:
        return TARGETS[name]()
    except ImportError as error:
        raise UserError(f"target {name}: {error.name or error} is not installed; run: make setup") from None


def parse_options(target: Target, options: Mapping[str, Any]) -> Options:
    """The target's validated options; UserError names the first wrong one and what is allowed."""
    try:
        return target.options.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"target {target.name}: option {key} is unknown; use {', '.join(target.options.model_fields)}"
            ) from None
        raise UserError(f"target {target.name}: option {key} is {first['input']!r}: {first['msg']}") from None


def build_target(
    name: str,
    stage_dir: Path,
    out_dir: Path,
    options: Mapping[str, Any] | None = None,
    memory: Callable[[], int] = lambda: 0,
) -> TargetResult:
    """Build the engine of one stage checkpoint into `out_dir`, which appears complete or not at all.

    `out_dir/engine.json` holds the result. An earlier engine in its place is replaced. `memory`: peak
    bytes of this process, if it was started for this engine alone.

    Raises:
        UserError: one sentence that names the target: unknown target or option, an `out_dir` that is not an engine, an
            unsupported op, dtype or architecture, a missing library, a failed check, a killed build.

    """
    target = get_target(name)
    parsed = parse_options(target, options or {})
    if out_dir.exists() and not (out_dir / RESULT).exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"target {name}: {out_dir} exists and is not an engine; remove it or choose another folder")
    started = time.monotonic()
    try:
        with atomic_directory(out_dir) as folder:
            result = target.build(stage_dir, folder, parsed)
            files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
            update: dict[str, Any] = {"files": files, "seconds": round(time.monotonic() - started, 3)}
            update["peak_memory"] = max(memory(), result.peak_memory or 0) or None
            result = result.model_copy(update=update)
            (folder / RESULT).write_text(result.model_dump_json(indent=2) + "\n")
    except UserError as error:
        raise UserError(f"target {name}: {error}") from error
    except ImportError as error:
        raise UserError(f"target {name}: {error.name or error} is not installed; run: make setup") from None
    except MemoryError:
        raise UserError(f"target {name}: not enough memory to build {stage_dir}; free some or use more") from None
    return result
