"""A long step that says nothing is said to go on."""

import logging
import re
import time
from pathlib import Path

from pdtrim_deploy.cli.progress import Progress


def printed_until(capsys, beginning):
    """All that was printed until a line says that it goes on, which may take a while on a busy machine."""
    printed, deadline = "", time.monotonic() + 60
    while time.monotonic() < deadline:
        printed += capsys.readouterr().err
        if any(line.startswith(f"  {beginning} (") and line.endswith(" s so far)") for line in printed.splitlines()):
            break
        time.sleep(0.05)
    return printed


def test_a_silent_step_says_that_it_goes_on(capsys):
    progress = Progress(silence_s=0.05)
    with progress.show("load"):
        progress.note("round 1 of 8")
        printed = printed_until(capsys, "round 1 of 8")
    lines = (printed + capsys.readouterr().err).splitlines()
    assert lines[0] == "load ..."
    assert [line for line in lines if line.startswith("  round 1 of 8 (") and line.endswith(" s so far)")]
    assert lines[-1].startswith("load: ")


def test_what_is_logged_inside_a_step_is_a_note_and_a_warning_stays(capsys, caplog):
    progress, logger = Progress(silence_s=0.05), logging.getLogger("pdtrim_deploy.kvcache")
    with progress.show("load"):
        logger.warning("packed by torch")
        logger.info("waiting for g++")
        printed = printed_until(capsys, "waiting for g++")
    logger.info("more")
    lines = (printed + capsys.readouterr().err).splitlines()
    assert lines[0] == "load ..."
    assert "packed by torch" in lines
    assert not [line for line in lines if "more" in line]
    assert [line for line in lines if line.startswith("  waiting for g++ (") and line.endswith(" s so far)")]
    assert [record.message for record in caplog.records] == ["packed by torch", "waiting for g++"]


def test_what_verbose_prints_is_no_note_too(capsys, caplog):
    caplog.set_level(logging.DEBUG)  # of the root logger, as -vv
    logger = logging.getLogger("pdtrim_deploy.kvcache")
    with Progress().show("load"):
        logger.warning("packed by torch")
        logger.debug("compiled")
    assert "packed" not in capsys.readouterr().err
    assert [record.message for record in caplog.records] == ["packed by torch", "compiled"]


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


def test_brackets_of_a_name_are_shown(capsys):
    with Progress().show("serve out/run[v2]"):
        pass
    with Progress().show("serve out/run[v2]", done=True):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[2]) == ("serve out/run[v2] ...", "serve out/run[v2]: done before")


def test_many_notes_in_a_moment_are_a_line_in_a_log_and_the_step_ends_with_one(capsys):
    progress = Progress()
    with progress.show("write"):
        begun = time.perf_counter()
        for number in range(1, 273):
            progress.note(f"tensors to write: {number}/272")
        took = time.perf_counter() - begun
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1].startswith("write: ")) == ("write ...", True)
    assert len(lines) <= 3 + took / 2.0


def test_benchmarks_build_as_the_command_does():
    """With `print` as their note, a log had a line for each tensor that was written."""
    folder = Path(__file__).parents[2] / "benchmarks"
    direct = {
        file.name for file in folder.glob("*.py") if re.search(r"\bbuild\($|\bbuild\([^)]", file.read_text(), re.M)
    }
    assert direct == {"__built.py", "__build_steps.py"}
    assert all("progress.note" in (folder / name).read_text().lower().replace("()", "") for name in direct)
