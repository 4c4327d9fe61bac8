"""Builds RECIPE into OUT and prints, as JSON, the peak memory of this process in each step, as the kernel counts it.

measured_steps.py RECIPE OUT CACHE [BLOCKS_IN_MEMORY] [STATE_BYTES]
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdtrim_deploy.local import allocator
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

peaks: dict[str, int] = {}


def peak() -> int:
    """Bytes since the last reset."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


@contextmanager
def show(name: str, done: bool) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    yield
    peaks[name] = peak()


if __name__ == "__main__":
    allocator.SMALL = 0  # the tests' models are tiny: their steps give memory back as those of real ones do
    recipe, out, cache, *limits = sys.argv[1:]
    compute = Compute(blocks_in_memory=int(limits[0]) if limits else None)
    build(Recipe.load(Path(recipe)), Path(out), Cache(Path(cache)), show=show, compute=compute)
    print(json.dumps(peaks))
