"""Parts as they may be on a real machine: tests run them in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pdtrim_deploy.gpucheck.checks import Check
from pdtrim_deploy.gpucheck.row import Row

GOOD = Row("good", "run", figure={"gb_s": 1.5, "of": "a copy"})


def then(*measures):
    """A good check, these, and one more."""
    checks = [Check("good", lambda: GOOD.figure)]
    return [*checks, *(Check(measure.__name__, measure) for measure in measures), Check("last", lambda: GOOD.figure)]


def well():
    return [Check("good", lambda: GOOD.figure)]


def with_serve(python, folder):
    return [Check("served", lambda: {"python": str(python), "empty": int(not os.listdir(folder))})]


def crashes():
    def crash():
        sys.stderr.write("RuntimeError: CUDA error: an illegal memory access was encountered\n")
        sys.stderr.flush()
        os._exit(1)

    return then(crash)


def hangs():
    def hang():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["CHILD"]).write_text(str(child.pid))
        time.sleep(600)

    return then(hang)


def hangs_deaf():
    def hang():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    return then(hang)


def killed():
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    return then(kill)


def exits():
    def leave():
        os._exit(3)

    return then(leave)


def leaves_early():
    def leave():
        raise SystemExit(0)

    return then(leave)


def loses_its_device():
    """As after an illegal memory access: what follows fails in the same process, and runs in another."""
    lost = []

    def illegal():
        lost.append(True)
        needs_device()

    def needs_device():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {}

    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=needs_device)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)
    return then(illegal, needs_device)


def raises():
    def fail():
        raise RuntimeError("CUDA out of memory\nand a page of text")

    return then(fail)


def late():
    return [*well(), Check("long", dict, seconds=500), Check("short", lambda: GOOD.figure)]


def broken():
    raise RuntimeError("no such device")


def silent():
    return []


def prints():
    print("Traceback", "\x00\xff", "{}")
    return well()


def garbage():
    def write():
        with Path(sys.argv[2]).open("a") as rows:
            rows.write('{"part": "x", "status": "flew"}\nnot json\n')
        return {}

    return then(write)


def another():
    def write():
        with Path(sys.argv[2]).open("a") as rows:
            rows.write('{"part": "good", "status": "run"}\n')
        return {}

    return then(write)


def odd_figure():
    return [Check("odd", lambda: {"error": [1, 2]})]
