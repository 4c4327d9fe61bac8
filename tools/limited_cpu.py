"""Run a command as on a CPU that has AVX2 and neither AVX-512 nor instructions for bfloat16 (x86, Linux).

    python3 tools/limited_cpu.py make demo OUT=out/demolimited      # make demo-limited

The libraries that choose kernels by the CPU (torch, oneDNN, MKL, numpy, OpenBLAS) are told so by their own environment
variables; g++ compiles for it; and /proc/cpuinfo, which our code and SGLang's read, lists no other instructions and
says in the model's name that they are limited. Nothing stops other libraries from asking the processor itself; MKL
obeys on Intel's CPUs alone.
Clock, caches and memory stay this machine's, so times are not those of an older machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NEWER = re.compile(r"\s(avx512\w*|avx_vnni\w*|avx10\w*|amx\w*|gfni|vaes|vpclmulqdq)\b")
# of numpy 2.3 and 2.4, which warn of names that they do not have
NUMPY = ("AVX512F", "AVX512CD", "AVX512_SKX", "AVX512_CLX", "AVX512_CNL", "AVX512_ICL", "AVX512_SPR", "X86_V4")
LIBRARIES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": " ".join(NUMPY),
}
# a mount namespace of the command's own: as root at once, else as root of a user namespace
UNSHARE = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--mount")
MOUNT = f'mount --bind "$0" {CPUINFO} && exec "$@"'


def limited(cpuinfo: str) -> str:
    """The text of /proc/cpuinfo without newer instructions, each model's name with the limit."""
    return re.sub(r"(?m)^(model name\s*:.*)$", r"\1, limited to AVX2", NEWER.sub("", cpuinfo))


def main() -> int:
    """The command's exit status."""
    compiler = shutil.which("g++")
    if platform.machine() != "x86_64" or " avx2" not in CPUINFO.read_text() or compiler is None:
        raise SystemExit("limited_cpu.py needs Linux on an x86 CPU with AVX2, and g++")
    if len(sys.argv) < 2:
        raise SystemExit("usage: limited_cpu.py COMMAND ...")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cpuinfo").write_text(limited(CPUINFO.read_text()))
        wrapper = folder / "g++"
        wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -march=haswell\n')  # the last -march counts
        wrapper.chmod(0o755)
        env = os.environ | LIBRARIES | {"PATH": f"{folder}:{os.environ['PATH']}"}
        command = [*UNSHARE, "sh", "-c", MOUNT, str(folder / "cpuinfo"), *sys.argv[1:]]
        return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
