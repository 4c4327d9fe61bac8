"""Parts as they may be on a real machine: tests run them in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pdtrim_deploy.gpucheck.row import Row

GOOD = Row("good", "run", figure={"gb_s": 1.5, "of": "a copy"})


def well():
    yield GOOD


def with_serve(python):
    yield Row("served", "run", figure={"python": str(python)})


def crashes():
    yield GOOD
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs():
    yield GOOD
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["CHILD"]).write_text(str(child.pid))
    time.sleep(600)


def hangs_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield GOOD
    time.sleep(600)


def killed():
    yield GOOD
    os.kill(os.getpid(), signal.SIGKILL)


def exits():
    yield GOOD
    os._exit(3)


def silent():
    yield from ()


def prints():
    print("Traceback", "\x00\xff", "{}")
    yield GOOD


def garbage():
    Path(sys.argv[2]).write_text('{"part": "good", "status": "run"}\n{"part": "x", "status": "flew"}\nnot json\n')
    yield from ()


def odd_figure():
    yield Row("odd", "run", figure={"error": [1, 2]})
