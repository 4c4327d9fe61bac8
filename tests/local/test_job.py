"""Jobs in a process of their own: how one ends is reported in one sentence."""

import os
import sys
import time

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import run_job


@pytest.mark.parametrize(("code", "sentence"), [
    ("import os; os.kill(os.getpid(), 9)", "was killed after .* GB in use, most likely for memory"),
    ("import os; os.abort()", "died of SIGABRT"),
    ("raise SystemExit('no more disk')", "ended with code 1 after .*: no more disk"),
])  # fmt: skip
def test_a_build_process_that_dies(code, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_job([sys.executable, "-c", code], {}, tmp_path, os.environ)


def test_peak_memory_is_that_of_the_process(tmp_path):
    ours = b"x" * 600_000_000  # of ours nothing must be counted
    # It holds its memory until two notes were heard, one after the other: in between its memory was looked at.
    code = """
import json, os, sys, time
x, job = b"x" * 300_000_000, json.load(open(sys.argv[1]))
for note in ("one", "two"):
    print(note, file=open(job["notes"], "a"), flush=True)
    while not os.path.exists(f"{job['notes']} {note}"):
        time.sleep(0.01)
open(job["answer"], "w").write("{}")
"""

    def heard(note):
        (tmp_path / f"notes.log {note}").touch()

    assert 300e6 < run_job([sys.executable, "-c", code], {}, tmp_path, os.environ, heard).peak_memory < 400e6
    del ours


def test_what_it_notes_is_heard_line_by_line(tmp_path):
    code = "import sys, json; job = json.load(open(sys.argv[1])); notes = open(job['notes'], 'a')"
    code += "; [print(f'{n} of 3', file=notes, flush=True) for n in (1, 2, 3)]; print('half', end='', file=notes)"
    code += "; open(job['answer'], 'w').write('{}')"
    heard = []
    run_job([sys.executable, "-c", code], {}, tmp_path, os.environ, heard.append)
    assert heard == ["1 of 3", "2 of 3", "3 of 3"]


def test_it_dies_with_whoever_started_it(tmp_path):
    """Kill -9 of a build leaves no builder behind."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = os.fork()
    if not parent:
        try:
            run_job([sys.executable, "-c", child], {}, tmp_path, os.environ)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    os.kill(parent, 9)
    os.waitpid(parent, 0)
    while _alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
