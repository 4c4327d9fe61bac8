"""Memory of this machine, as SGLang's CPU worker counts it too."""

from __future__ import annotations

import os
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def memory() -> tuple[int, int]:
    """Total and available bytes, of the machine or within the cgroup's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        read = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
        total, free = read["MemTotal"], read["MemAvailable"]
    except (OSError, KeyError):
        total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def numa_nodes(folder: Path = _NODES) -> int:
    """NUMA nodes with processors; 1 if the machine does not report them."""
    return sum(bool(file.read_text().strip()) for file in folder.glob("node[0-9]*/cpulist")) or 1
