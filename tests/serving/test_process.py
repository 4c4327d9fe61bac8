"""Supervision of one program, with a small fake one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pdtrim_deploy.serving.process import ServerProcess, log_tail, session_members, stop_all

CHILD = Path(__file__).with_name("child.py")
DEADLINE_S = 120.0


def until(condition, what):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"{what} not within {DEADLINE_S} s"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    started = []

    def run(mode, output="ready"):
        log = tmp_path / f"{mode}.log"
        process = ServerProcess(mode, [sys.executable, str(CHILD), mode], os.environ, log)
        started.append(process)
        until(lambda: output in log_tail(log), f"{mode} said {output!r}")
        return process

    yield run
    stop_all(started, 0.0)


def test_a_polite_program_ends_at_sigterm(start):
    process = start("polite")
    assert process.exit_code() is None
    begun = time.monotonic()
    stop_all([process], DEADLINE_S)
    assert process.exit_code() == -signal.SIGTERM
    assert time.monotonic() - begun < DEADLINE_S / 2


def test_a_program_deaf_to_sigterm_is_killed_after_the_grace(start):
    process = start("stubborn")
    begun = time.monotonic()
    stop_all([process], 0.3)
    assert process.exit_code() == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - begun < DEADLINE_S


@pytest.mark.parametrize("mode", ["parent", "orphan-maker"])
def test_grandchildren_go_too_even_when_their_parent_left_first(start, mode):
    process = start(mode, output="deaf")
    if mode == "orphan-maker":
        until(lambda: process.exit_code() == 3, "the parent ended")
    assert len(session_members(process.pid)) >= 1
    stop_all([process], 2.0)
    assert session_members(process.pid) == []


def test_the_obituary_says_which_how_why_and_where(start):
    process = start("dies", output="ValueError")
    until(lambda: process.exit_code() is not None, "its end")
    first, second, *rest = process.obituary(lines=3).splitlines()
    assert first == "dies ended with exit code 1: ValueError: no such layer: 7"
    assert second == f"last lines of {process.log}:"
    assert len(rest) == 3
    assert rest[-1] == "  | ValueError: no such layer: 7"


def test_the_obituary_prefers_a_reason_of_ours_to_errors_behind_it(start):
    process = start("dies", output="ValueError")
    until(lambda: process.exit_code() is not None, "its end")
    with process.log.open("a") as log:
        log.write("RuntimeError: pdtrim: it cannot be so: start otherwise\nEOFError\n")
    assert process.obituary().startswith(
        "dies ended with exit code 1: RuntimeError: pdtrim: it cannot be so: start other"
    )


def test_the_obituary_names_the_signal(start):
    process = start("polite")
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: process.exit_code() is not None, "its end")
    assert process.obituary().startswith("polite was ended by SIGKILL\n")


def test_an_interrupted_stop_kills_at_once(start, monkeypatch):
    process = start("stubborn")
    calls = []
    finish = process.finish

    def finish_interrupted(deadline):
        calls.append(deadline)
        if len(calls) == 1:
            raise KeyboardInterrupt
        finish(deadline)

    monkeypatch.setattr(process, "finish", finish_interrupted)
    with pytest.raises(KeyboardInterrupt):
        stop_all([process], 600.0)
    assert process.exit_code() == -signal.SIGKILL


def test_children_die_when_the_supervisor_is_killed(tmp_path):
    script = f"""
        import os, sys, time
        from pathlib import Path
        from pdtrim_deploy.serving.process import ServerProcess
        log = Path({str(tmp_path)!r}) / "c.log"
        process = ServerProcess("c", [sys.executable, {str(CHILD)!r}, "polite"], os.environ, log)
        print(process.pid, flush=True)
        time.sleep(600)
    """
    supervisor = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        child = int(supervisor.stdout.readline())
        until(lambda: "ready" in log_tail(tmp_path / "c.log"), "the child")
        assert session_members(child) == [child]
    finally:
        supervisor.kill()
        supervisor.communicate()
    until(lambda: session_members(child) == [], "the child's end")


def test_session_members_reads_names_with_spaces_and_parentheses(tmp_path):
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to(sys.executable)
    process = ServerProcess("odd", [str(odd), "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "odd.log")
    try:
        until(lambda: session_members(process.pid) == [process.pid], "the odd one")
    finally:
        stop_all([process], 0.0)
