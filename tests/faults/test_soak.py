"""Many requests of all lengths, some of them aborted: nothing grows, and a probe among them scores alike."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from client import TEXTS, Request, draw, send
from stand import DEADLINE_S

from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(3000)]
BLOCKS = 20
MAY_GROW = 0.02  # of the memory of a worker's processes, first third to last third after a warm-up


PROBES, PROBE = 25, Request(TEXTS[0][:333], 8)  # each of so many requests is the probe
SPREAD = 1e-4  # nats: float32, in batches with ever other requests


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


def test_a_probe_scores_alike_among_500_requests(stand):
    """Beside others, after others, with and without rows that are known: SGLang #23020."""
    requests = draw(500, (2, 400), (2, 16), seed=16, aborts=0.1)
    requests[::PROBES] = [PROBE] * len(requests[::PROBES])
    ended = send(stand.url, requests, DEADLINE_S)
    row = stand.verdict(f"500 requests, one in {PROBES} the same probe", ended)
    assert row.answered == row.sent - row.aborted
    probes = [outcome for outcome in ended if outcome.request is PROBE]
    assert len({tuple(outcome.tokens) for outcome in probes}) == 1
    spread = max(max(values) - min(values) for values in zip(*(probe.logprobs for probe in probes), strict=True))
    stand.rows[-1] = replace(row, spread_nats=spread)
    print(f"{len(probes)} probes, logprobs within {spread:.1e} nats")
    assert spread <= SPREAD
