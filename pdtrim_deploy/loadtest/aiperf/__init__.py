"""NVIDIA's aiperf as load driver: a program in its own environment, told exactly which requests to send and when.

It gets the requests that `builtin` would send, from the same scenario and seed, as a Mooncake trace with literal texts,
and sends them to `/v1/completions`. What it measured is read from its raw records, one for each request with the time
of every chunk; the server's own token counts make TTFT, ITL and lengths mean the same with both drivers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pdtrim_deploy.loadtest import builtin
from pdtrim_deploy.loadtest.aiperf.command import check, run, write_requests
from pdtrim_deploy.loadtest.aiperf.environment import program
from pdtrim_deploy.loadtest.aiperf.records import read
from pdtrim_deploy.loadtest.base import LoadRun
from pdtrim_deploy.loadtest.scenario import Scenario
from pdtrim_deploy.loadtest.schedule import jobs


def drive(url: str, scenario: Scenario) -> LoadRun:
    """Put the load of `scenario` on `url`; the warm-up, which is not measured, is sent by `builtin`.

    Raises:
        UserError: the scenario asks what aiperf cannot do, or aiperf cannot be installed here.
        ServingError: aiperf wrote no records, or did not end in time.

    """
    check(scenario)
    aiperf = program()
    planned_jobs = tuple(jobs(scenario))
    if scenario.warmup:
        builtin.drive(url, scenario.warming())
    with tempfile.TemporaryDirectory(prefix="pdtrim-aiperf-") as folder:
        write_requests(Path(folder), planned_jobs)
        run(aiperf, url, scenario, planned_jobs, Path(folder))
        return read(
            Path(folder) / "out", planned_jobs, every=scenario.duration_s is None or planned_jobs[0].due_s is not None
        )
