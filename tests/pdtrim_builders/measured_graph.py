"""Builds the graph of a STAGE with its weights in a file of their own; prints its peak memory, without mapped pages.

measured_graph.py STAGE OUT
"""

import re
import sys
import threading
from pathlib import Path

from pdtrim_builders import build_target


def resident(kind: str) -> int:
    """Bytes now, of that line of /proc: RssAnon or RssFile."""
    match = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


if __name__ == "__main__":
    over, most = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    build_target("onnx", Path(sys.argv[1]), Path(sys.argv[2]), {"external_above": 0, "tolerance": 0.01})
    over.set()
    watcher.join()
    print(most[0])
