"""Builds RECIPE into OUT and prints the most memory that the process had, in bytes: what no file stands behind.

Pages of mapped files (weights being read, libraries) go when memory is short, so they are not counted.
"""

import re
import sys
import threading
from pathlib import Path

from pdtrim_deploy.cli import main

STATUS, EVERY_S = Path("/proc/self/status"), 0.01
peak, over = 0, threading.Event()


def watch() -> None:
    global peak  # noqa: PLW0603
    while not over.wait(EVERY_S):
        peak = max(peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1]))


watching = threading.Thread(target=watch)
watching.start()
try:
    main(["build", sys.argv[1], "--out", sys.argv[2], "--cache-dir", sys.argv[3]])
except SystemExit as ended:
    if ended.code:
        raise
finally:
    over.set()
    watching.join()
print(peak)
