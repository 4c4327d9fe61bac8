"""A long step that says nothing is said to go on."""

import time

from pdtrim_deploy.cli.progress import Progress


def test_a_silent_step_says_that_it_goes_on(capsys):
    progress = Progress(silence_s=0.05)
    with progress.show("load"):
        progress.note("round 1 of 8")
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "load ..."
    assert [line for line in lines if line.startswith("  round 1 of 8 (") and line.endswith(" s so far)")]
    assert lines[-1].startswith("load: ")


def test_a_step_that_fails_ends_its_watch(capsys):
    progress = Progress(silence_s=0.05)
    try:
        with progress.show("load"):
            raise ValueError
    except ValueError:
        pass
    before = capsys.readouterr().err
    time.sleep(0.3)
    assert "load: " not in before
    assert capsys.readouterr().err == ""
