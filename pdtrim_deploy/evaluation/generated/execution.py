"""Programs that a model wrote, run in a child: little CPU time, memory and disk, no network, a folder of its own.

That is against accidents, not against attacks: a child reads, writes and deletes what its user may.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pdtrim_deploy.local.child import Child

CPU_S, WALL_S = 10, 30.0
_LIMITED = Path(__file__).with_name("limited.py")


_RUNNER = """import os, sys, types
module = sys.modules["answer"] = types.ModuleType("answer")
for part in {parts!r}:
    exec(compile(part, "answer.py", "exec", dont_inherit=True), module.__dict__)
os.write(1, {end!r})
"""


def passes(*parts: str, cpu_s: int = CPU_S, wall_s: float = WALL_S) -> bool:
    """Whether a program runs to its end: leaving early, even with exit code 0, is no pass.

    Its parts are compiled each by itself, so that every one may begin with `from __future__`, and run in turn in one
    module named `answer`: what stands under `if __name__ == "__main__"` does not run.
    """
    end = secrets.token_hex(16)
    texts = [part.encode(errors="replace").decode() for part in parts]
    with tempfile.TemporaryDirectory(prefix="pdtrim-answer-", ignore_cleanup_errors=True) as folder:
        file, out = Path(folder, "answer.py"), Path(folder, "stdout")
        file.write_text(_RUNNER.format(parts=texts, end=f"\n{end}\n".encode()), encoding="utf-8")
        with out.open("wb") as stdout:
            child = Child(
                [sys.executable, "-I", _LIMITED, file, str(cpu_s)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True,
                cwd=folder, env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            try:
                code = child.wait(wall_s)
            except subprocess.TimeoutExpired:
                return False
            finally:
                child.terminate()  # it kills what it started
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(30)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return code == 0 and end.encode() in out.read_bytes().split(b"\n")
