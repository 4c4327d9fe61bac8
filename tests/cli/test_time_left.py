"""Rate and time left, from the counts in lines of progress."""

import pytest

from pdtrim_deploy.cli.progress import Progress
from pdtrim_deploy.cli.time_left import TimeLeft


def lines_of(*timed):
    times = iter([at for at, line in timed if "/" in line or " of " in line])
    left = TimeLeft(lambda: next(times))
    return [left.of(line) for _, line in timed]


def test_the_last_count_of_a_line_tells_rate_and_time_left():
    lines = lines_of(
        (0, "effects, batch 1/2: 10/400 layers"), (2, "effects, batch 1/2: 30/400 layers"), (3, "loss 3.21 nats"),
        (8, "effects, batch 1/2: 50/400 layers"),
    )  # fmt: skip
    assert lines[0] == "effects, batch 1/2: 10/400 layers"
    assert lines[1] == "effects, batch 1/2: 30/400 layers (10.0/s, 37 s left)"
    assert lines[2:] == ["loss 3.21 nats", "effects, batch 1/2: 50/400 layers (5.0/s, 70 s left)"]


def test_other_work_begins_anew_and_slow_work_has_seconds_each():
    lines = lines_of(
        (0, "a: 1 of 9 texts"), (60, "a: 2 of 9 texts"), (61, "b: 1 of 9 texts"), (62, "b: 1 of 9 texts"),
        (63, "a: 1 of 9 texts"), (64, "b: 12/9 texts"),
    )  # fmt: skip
    assert lines[1] == "a: 2 of 9 texts (60.0 s each, 7.0 min left)"
    assert lines[2:] == ["b: 1 of 9 texts", "b: 1 of 9 texts", "a: 1 of 9 texts", "b: 12/9 texts"]


def test_what_comes_and_goes_behind_the_count_is_no_other_work():
    lines = lines_of(
        (0, "decode: least squares, 1/9 blocks"), (2, "decode: least squares, 2/9 blocks, error 0.2, mean 0.1"),
        (4, "decode: least squares, 3/9 blocks"),
    )  # fmt: skip
    assert lines[1:] == [
        "decode: least squares, 2/9 blocks, error 0.2, mean 0.1 (2.0 s each, 14 s left)",
        "decode: least squares, 3/9 blocks (2.0 s each, 12 s left)",
    ]


def test_megabytes_have_a_rate_however_slow():
    lines = lines_of(
        (0, "m (part 1 of 2): 1 of 90 MB"), (10, "m (part 1 of 2): 3 of 90 MB"), (11, "hashing: 0.3 of 0.8 MB"),
    )  # fmt: skip
    assert lines[1:] == ["m (part 1 of 2): 3 of 90 MB (0.2 MB/s, 7.2 min left)", "hashing: 0.3 of 0.8 MB"]


def test_the_same_work_once_more_begins_anew():
    lines = lines_of(
        (0, "fit: 1/4 blocks"), (1, "fit: 2/4 blocks"), (2, "fit: 4/4 blocks"), (100, "fit: 1/4 blocks"),
        (102, "fit: 2/4 blocks"),
    )  # fmt: skip
    assert lines[2:] == [
        "fit: 4/4 blocks (1.5/s, 0 s left)",
        "fit: 1/4 blocks",
        "fit: 2/4 blocks (2.0 s each, 4 s left)",
    ]


def test_a_line_that_tells_the_time_left_itself_stays_as_it_is():
    first, second = (f"healing decode: step {step}/60, loss 2.3, 305 tokens/s, {160 - step} s left" for step in (1, 2))
    assert lines_of((0, first), (9, second)) == [first, second]


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_of_a_step_have_it(terminal, capsys, monkeypatch):
    monkeypatch.setattr("pdtrim_deploy.cli.progress.BETWEEN_NOTES_S", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    progress = Progress()
    with progress.show("prune"):
        progress.note("redundancy: 1/30 blocks")
        progress.note("redundancy: 2/30 blocks")
        assert " left)" in progress._last
    if not terminal:
        assert " left)" in capsys.readouterr().err
