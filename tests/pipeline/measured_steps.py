"""Builds RECIPE into OUT and prints, as JSON, the peak memory of this process in each step, as the kernel counts it.

measured_steps.py RECIPE OUT CACHE [BLOCKS_IN_MEMORY [unmapped]]

`unmapped`: without pages of files, whose place the kernel takes when it needs it, but for those of the program itself:
looked at every 2 ms, for the kernel keeps no peak of these.
"""

import json
import re
import sys
import threading
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


def resident(kind: str) -> int:
    """Bytes now, of that line of /proc: RssAnon or RssFile."""
    match = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


@contextmanager
def unmapped(name: str, done: bool) -> Iterator[None]:
    over, most = threading.Event(), [0]
    program = resident("RssFile")

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    over.set()
    watcher.join()
    peaks[name] = program + most[0]


@contextmanager
def show(name: str, done: bool) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    yield
    peaks[name] = peak()


if __name__ == "__main__":
    allocator.SMALL = 0  # the tests' models are tiny: their steps give memory back as those of real ones do
    recipe, out, cache, *limits = sys.argv[1:]
    compute = Compute(blocks_in_memory=int(limits[0]) if limits else None)
    watched = unmapped if limits[1:] else show
    build(Recipe.load(Path(recipe)), Path(out), Cache(Path(cache)), show=watched, compute=compute)
    print(json.dumps(peaks))
