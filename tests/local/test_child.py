"""A child is awaited after Ctrl-C fell anywhere into an earlier look at it."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from pdtrim_deploy.local.child import Child

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def interrupted_soon():
    """Arms a timer whose KeyboardInterrupt falls into whatever runs then."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("look", [Child.poll, lambda child: child.wait(1e-6)], ids=["poll", "wait"])
def test_interrupted_in_every_place(look, interrupted_soon):
    child = Child(SLEEPS)
    for number in range(300):  # Popen's own keeps its lock after one in six
        with pytest.raises(KeyboardInterrupt):
            _look_until(child, look, lambda number=number: interrupted_soon(3e-4 + number % 97 * 1e-6))
    assert child.poll() is None
    child.kill()
    assert child.wait(30) == -signal.SIGKILL


def _look_until(child, look, interrupt):
    interrupt()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            look(child)


def test_exit_codes(capfd):
    with Child([sys.executable, "-c", "raise SystemExit(3)"]) as child:
        assert child.wait() == child.poll() == child.returncode == 3
        child.terminate()  # of one that has ended: nothing
    with Child(SLEEPS) as child:
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired, match=r"timed out after 0\.2 seconds"):
            child.wait(0.2)
        assert 0.2 <= time.monotonic() - began < 30
        child.terminate()
    assert child.returncode == -signal.SIGTERM
    with Child([sys.executable, "-c", "print('x' * 100_000)"], stdout=subprocess.PIPE, text=True) as child:
        assert len(child.communicate()[0]) == 100_001
    assert capfd.readouterr().err == ""


def test_a_system_that_keeps_no_codes():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Child([sys.executable, "-c", ""]) as child:
            assert child.wait(30) == 0
    finally:
        signal.signal(signal.SIGCHLD, before)
