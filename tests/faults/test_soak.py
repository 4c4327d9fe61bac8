"""Many requests of all lengths, some of them aborted: nothing grows."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from client import draw, send
from stand import DEADLINE_S

from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(3000)]
BLOCKS = 20
MAY_GROW = 0.02  # of the memory of a worker's processes, first third to last third after a warm-up


def weight(worker) -> dict[str, int]:
    """Resident bytes, open files and threads of a worker's processes."""
    counts = {"bytes": 0, "files": 0, "threads": 0}
    for pid in session_members(worker.pid):
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            counts["bytes"] += int(status["VmRSS"].split()[0]) << 10
            counts["threads"] += int(status["Threads"])
            counts["files"] += len(os.listdir(f"/proc/{pid}/fd"))
    return counts


def test_soak_behind_one_router(stand, request):
    count = request.config.getoption("--soak-requests", None) or 200
    requests = draw(count, (2, 400), (2, 16), seed=15, aborts=0.2)
    ended, seen = [], []
    for block in range(BLOCKS):
        part = requests[block * count // BLOCKS : (block + 1) * count // BLOCKS]
        ended += send(stand.url, part, DEADLINE_S)
        leaked = stand.leaked()
        assert not leaked, f"after {len(ended)} requests"
        seen.append({stage: weight(stand.worker(stage)) for stage in ("prefill", "decode")})
    row = stand.verdict(f"soak: {count} requests, a fifth of them aborted", ended)
    assert row.answered == row.sent - row.aborted
    settled, grown = seen[BLOCKS // 4 :], {}
    third = len(settled) // 3
    for stage in ("prefill", "decode"):
        for figure, most in (("bytes", MAY_GROW), ("files", 0.0), ("threads", 0.0)):
            first, last = (
                median(sample[stage][figure] for sample in part) for part in (settled[:third], settled[-third:])
            )
            grown[f"{stage} {figure}"] = round(last / first, 5)
            print(f"{stage} {figure}: {[sample[stage][figure] for sample in seen]}")
            # a sample may fall into a request's end: two files or threads are nobody's leak
            assert last <= first * (1 + most) + (0 if most else 2), f"{stage} {figure}: {first} -> {last}"
    stand.rows[-1] = replace(row, grown=grown)
