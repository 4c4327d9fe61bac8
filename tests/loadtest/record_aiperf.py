"""Make tests/loadtest/recorded again, by running the real aiperf (.venv/aiperf) against the SSE server: two minutes.

.venv/build/bin/python tests/loadtest/record_aiperf.py
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sse_server import Behaviour, serve

from pdtrim_deploy.loadtest.aiperf.command import run, write_requests
from pdtrim_deploy.loadtest.aiperf.environment import program
from pdtrim_deploy.loadtest.scenario import Arrivals, Lengths, Scenario
from pdtrim_deploy.loadtest.schedule import jobs

RECORDED = Path(__file__).parent / "recorded"
FILES = ("profile_export.jsonl", "profile_export_raw.jsonl")
TWO = Scenario.closed(2, 2, (5, 5), (6, 6), warmup=0, deadline_s=2.0)
POISSON = Scenario(
    name="poisson",
    arrivals=Arrivals(kind="poisson", rate=8.0),
    input=Lengths(kind="uniform", low=3, high=12),
    output=Lengths(kind="uniform", low=2, high=7),
    requests=5,
    warmup=0,
)
CASES = {
    "poisson": (Behaviour(ttft=0.1, itl=0.03), POISSON),
    "chunks": (Behaviour(ttft=0.05, itl=0.09, chunk=3), TWO),
    "status": (Behaviour(status=503), TWO),
    "lose": (Behaviour(lose=2), TWO),
    "silent": (Behaviour(silent=True), TWO),
    "error_event": (Behaviour(error_event=True), TWO),
    "garbage": (Behaviour(garbage=True), TWO),
    "hang": (Behaviour(hang=True), TWO),
    "refused": (None, TWO),
}


def record(behaviour: Behaviour | None, scenario: Scenario, out: Path) -> None:
    planned_jobs = tuple(jobs(scenario))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_requests(folder, planned_jobs)
        with serve(behaviour or Behaviour()) as url:
            if behaviour is not None:
                run(program(), url, scenario, planned_jobs, folder)
        if behaviour is None:
            run(program(), url, scenario, planned_jobs, folder)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in FILES:
            if (folder / "out" / file).is_file():
                shutil.copy(folder / "out" / file, out)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        record(*CASES[case], RECORDED / case)
        print(case, sorted(file.name for file in (RECORDED / case).iterdir()))
