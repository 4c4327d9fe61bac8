"""Programs that a model wrote, run in a child: little CPU time, memory and disk, no network, a folder of its own.

That is against accidents, not against attacks: a child reads what its user may read.
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

CPU_S, WALL_S = 10, 30.0
_LIMITED = Path(__file__).with_name("limited.py")


def passes(program: str, cpu_s: int = CPU_S, wall_s: float = WALL_S) -> bool:
    """Whether the program runs to its end: leaving early, even with exit code 0, is no pass."""
    end = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="pdtrim-answer-", ignore_cleanup_errors=True) as folder:
        file, out = Path(folder, "answer.py"), Path(folder, "stdout")
        file.write_text(f"{program}\nprint({end!r})\n", encoding="utf-8", errors="replace")
        with out.open("wb") as stdout:
            child = subprocess.Popen(
                [sys.executable, "-I", _LIMITED, file, str(cpu_s)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True,
                cwd=folder, env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            try:
                code = child.wait(wall_s)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it started, too
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return code == 0 and out.read_bytes().decode(errors="replace").strip().endswith(end)
