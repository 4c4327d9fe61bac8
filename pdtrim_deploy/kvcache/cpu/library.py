"""rows.cpp and its headers as a shared library, compiled for this very CPU at first use and kept in the cache.

It knows nothing of Python or torch, so that both environments, and all workers, use one file.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache

SOURCE = Path(__file__).with_name("rows.cpp")
OPTIONS = (
    "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
NAME = "librows.so"
CPUINFO = Path("/proc/cpuinfo")
_KINDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # the first two of x86, the others of ARM
logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library; None, and one warning that says why, where it cannot be had."""
    try:
        path = Cache.default().entry("kvcache-cpu", _key(), compile_into) / NAME
        return ctypes.CDLL(str(path))
    except (UserError, OSError) as error:
        logger.warning("pdtrim: KV is packed by torch's own operations, the same bytes but far slower: %s", error)
        return None


def compile_into(folder: Path) -> None:
    """Compile rows.cpp to `folder/librows.so`.

    Raises:
        UserError: there is no g++, or it refused the source.

    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise UserError("g++ is not on PATH; install it (Debian: apt-get install g++) and start again")
    logger.info("waiting for g++, which compiles the packing of KV for this CPU, once")
    command = [compiler, *OPTIONS, "-o", str(folder / NAME), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{compiler} refused {SOURCE.name}: {done.stderr.strip()[:300]}")


def _key() -> str:
    """Sources, options and what `-march=native` depends on."""
    cpu = [platform.machine(), *platform.libc_ver()]
    try:
        lines = CPUINFO.read_text().splitlines()
        cpu += [next((line for line in lines if line.startswith(key)), "") for key in _KINDS]
    except OSError:
        cpu.append(platform.processor())
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    return hashlib.sha256("\0".join((*sources, *OPTIONS, *cpu)).encode()).hexdigest()[:32]
