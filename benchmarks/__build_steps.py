"""Build a recipe and say what each step took: run by build.py as a program, against the sources in PYTHONPATH.

    python __build_steps.py RECIPE OUT CACHE

Prints one JSON object: the plan, and of each step its seconds, CPU-seconds, peak memory and calls of a block, whatever
the batch (block-forwards count each sequence of it). Memory is resident bytes of this process (Linux' VmHWM, begun anew
with each step). Nothing here depends on how a step works inside, so that sources of another commit are measured alike.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdtrim_deploy.cli.progress import Progress
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.pipeline.build import build
from pdtrim_deploy.recipe import Recipe


class _Blocks:
    """Counts calls of `Blockwise.block`."""

    def __init__(self) -> None:
        self.calls, original = 0, Blockwise.block

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return original(*arguments, **options)

        Blockwise.block = counted  # type: ignore[method-assign]


def peak_mb() -> float:
    """Most resident memory since `reset_peak`, MB of 10^6 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e6


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    recipe, out, cache = map(Path, sys.argv[1:])
    rows, blocks = list[dict[str, object]](), _Blocks()

    @contextlib.contextmanager
    def show(name: str, done: bool) -> Iterator[None]:
        reset_peak()
        begun, worked, calls = time.perf_counter(), time.process_time(), blocks.calls
        yield
        took = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked}
        rows.append({"step": name} | took | {"peak_mb": peak_mb(), "block_calls": blocks.calls - calls})
        print(f"{name}: {took['seconds']:.1f} s, {took['cpu_seconds']:.1f} of a CPU", file=sys.stderr, flush=True)

    plan = build(Recipe.load(recipe), out, Cache(cache), Progress().note, show=show).plan
    print(json.dumps({"plan": plan.digest, "steps": rows}))


if __name__ == "__main__":
    main()
