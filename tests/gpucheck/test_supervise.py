"""Whatever a part does, the check has its rows, says why it failed, and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from parts_that_fail import GOOD

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck import attempt, check, command, supervise
from pdtrim_deploy.gpucheck.base import Part, line, parse
from pdtrim_deploy.gpucheck.check import LEAST_S
from pdtrim_deploy.gpucheck.machine import PACKAGES, Environment, choose
from pdtrim_deploy.gpucheck.registry import PARTS, parts_named
from pdtrim_deploy.gpucheck.row import Row

PYTHON = Path(sys.executable)
GPU = {"name": "a GPU", "count": 1, "capability": "9.0", "memory": 80 << 30}
HERE = Environment(PYTHON, ("torch", "triton"), {"torch": "2.9", "python": "3.11"}, GPU)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(attempt, "GRACE_S", 1.0)


def within(seconds=600.0):
    return time.monotonic() + seconds


def ended(pid, deadline):
    """Whether a process that was killed has ended by the deadline: a busy machine may take seconds for it."""
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def part(name, seconds=60.0, **more):
    return Part(name, f"parts_that_fail:{name}", seconds, **more)


@pytest.mark.parametrize("row", [GOOD, Row("x", "skipped", "no torch"), Row("x", "failed", "why")])
def test_a_row_is_read_back(row):
    assert parse(line(row)) == row


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "3", '{"part": 1, "status": "run"}', '{"part": "x", "status": "flew"}', "\x00",
             '{"part": "x", "status": "run", "more": 1}', '{"part": "x", "status": "run", "figure": {"a": NaN}}',
             '{"part": "x", "status": "run", "figure": [1]}'],
)  # fmt: skip
def test_what_is_no_row_is_told_from_one(text):
    with pytest.raises(ValueError, match=r"not a row|Expecting|Invalid|argument"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "check_name", "reason"),
    [
        ("crashes", "crash", "ended with exit code 1: RuntimeError: CUDA error: an illegal memory access was"),
        ("killed", "kill", "ended by SIGKILL, most likely for memory"),
        ("exits", "leave", "ended with exit code 3"),
        ("leaves_early", "leave", "ended with exit code 0 before this check was done"),
        ("garbage", "write", "line 3 of what it wrote cannot be read: not a row"),
        ("another", "write", "line 3 of what it wrote cannot be read: a row of good, which is not the next check"),
    ],
)
def test_what_ran_is_kept_what_broke_has_failed_and_another_process_does_the_rest(name, check_name, reason):
    first, broken, last = supervise.run_part(part(name), PYTHON, 200)
    assert first == GOOD
    assert (broken.part, broken.status) == (check_name, "failed")
    assert broken.reason.startswith(reason)
    assert last == Row("last", "run", figure=GOOD.figure)


def test_without_time_for_another_process_the_rest_is_named(monkeypatch):
    monkeypatch.setattr(supervise, "LEAST_S", 60.0)
    assert supervise.run_part(part("crashes"), PYTHON, 50)[-1] == Row("last", "skipped", supervise.NOT_BEGUN)


def test_a_lost_device_costs_one_check_and_a_new_process_goes_on():
    first, broken, other, last = supervise.run_part(part("loses_its_device"), PYTHON, 200)
    assert (first, last) == (GOOD, Row("last", "run", figure=GOOD.figure))
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: CUDA error: an illegal memory access")
    assert (other.part, other.status) == ("needs_device", "run")
    assert first.figure


def test_a_check_that_raises_has_failed_and_the_others_go_on():
    assert supervise.run_part(part("raises"), PYTHON, 200) == [
        GOOD,
        Row("fail", "failed", "RuntimeError: CUDA out of memory"),
        Row("last", "run", figure=GOOD.figure),
    ]


def test_a_check_that_needs_more_time_than_is_left_is_skipped_and_shorter_ones_go_on():
    first, skipped, last = supervise.run_part(part("late"), PYTHON, 200)
    assert (first, last.status) == (GOOD, "run")
    assert skipped == Row("long", "skipped", "no time was left: it needs 500 s of its part's")


def test_a_part_that_prints_anything_is_none_the_worse():
    assert supervise.run_part(part("prints"), PYTHON, 200) == [GOOD]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("silent", "ended without a row"),
        ("missing", "ended with exit code 1: AttributeError"),
        ("broken", "ended with exit code 1: RuntimeError: no such device"),
    ],
)
def test_a_part_without_a_row_has_failed(name, reason):
    (row,) = supervise.run_part(part(name), PYTHON, 200)
    assert row.status == "failed"
    assert row.reason.startswith(reason)


def test_a_figure_that_is_none_is_refused():
    (row,) = supervise.run_part(part("odd_figure"), PYTHON, 200)
    assert "no mapping to numbers" in row.reason


def test_sglangs_python_is_passed_on():
    (row,) = supervise.run_part(part("with_serve"), PYTHON, 200, Path("/serve/python"))
    assert row.figure == {"python": "/serve/python", "empty": 1}


@pytest.mark.parametrize(("name", "status"), [("hangs", "failed"), ("hangs_deaf", "failed"), ("hangs", "skipped")])
def test_a_check_that_hangs_ends_at_its_deadline_with_all_it_started(name, status, tmp_path, monkeypatch):
    """One that was stopped soon after it began has not failed: its part's time was over."""
    monkeypatch.setenv("CHILD", str(tmp_path / "pid"))
    monkeypatch.setattr(supervise, "HUNG_S", 1.0 if status == "failed" else 90.0)
    monkeypatch.setattr(supervise, "LEAST_S", 1.0)
    # A busy machine takes seconds to start the process that does the last check: its half must be long enough.
    for seconds in (40,) if status == "failed" else (10, 60):
        rows = supervise.run_part(part(name), PYTHON, seconds)
        if (tmp_path / "pid").exists():  # so far it had come
            break
    first, hung, last = rows
    assert (first, hung.part, hung.status) == (GOOD, "hang", status)
    if status == "failed":  # its half of the time was over, and the rest of it is the last check's
        assert 10 <= int(re.match(r"not done within (\d+) s", hung.reason)[1]) <= 21
        assert last == Row("last", "run", figure=GOOD.figure)
    else:
        over = rf"its part's {seconds} s were over \d+ s after it began; run it: gpu-check --part"
        assert re.match(over, hung.reason)
        assert last == Row("last", "skipped", supervise.NOT_BEGUN)
    if name == "hangs":
        assert ended(int((tmp_path / "pid").read_text()), within(30))


def test_the_other_parts_go_on_and_what_is_there_is_written_after_each():
    seen = []
    parts = [part("crashes"), Part("none", "no_such_module:rows", 60), part("well")]
    outcome = check.check(parts, HERE, None, end=within(), done=seen.append)
    kinds = [(row.part, row.status) for row in outcome.rows]
    assert kinds == [
        ("good", "run"),
        ("crash", "failed"),
        ("last", "run"),
        ("none", "skipped"),
        ("good", "run"),
    ]
    assert outcome.failed
    begun = [[row for row in early.rows if row.reason != check.STOPPED] for early in seen]
    assert [len(rows) for rows in begun] == [0, 3, 4, 5]
    assert [len(early.rows) - len(rows) for early, rows in zip(seen, begun, strict=True)] == [3, 2, 1, 0]
    assert outcome.rows[3].reason == "this version has no no_such_module"


def test_parts_share_one_budget():
    outcome = check.check([part("well")], HERE, None, end=within(check.GRACE_S + LEAST_S - 1))
    assert [(row.status, row.reason) for row in outcome.rows] == [
        ("skipped", "no time was left; run it alone: gpu-check --part well")
    ]


def test_the_parts_that_are_not_extra_fit_the_budget_and_run_first():
    parts = list(PARTS.values())
    assert sum(known.seconds for known in parts if not known.extra) <= check.BUDGET_S - 20  # Pythons are asked first
    assert [known.extra for known in parts] == sorted(known.extra for known in parts)
    main = {"kernels", "oracle", "served", "smollm2", "itl", "nixl", "mooncake", "tensorrt"}
    assert {known.name for known in parts if not known.extra} == main


@pytest.mark.parametrize(
    ("seconds", "later", "expected"),
    [
        (60, [part("well", 100)], 480),  # what later parts need is kept for them
        (60, [part("well", 580)], 60),  # but its own seconds are its own
        (60, [part("well", 100, extra=True), part("well", 100, modules=("onnx",))], 580),  # these keep nothing
    ],
)
def test_a_part_gets_what_later_parts_leave(monkeypatch, seconds, later, expected):
    deadlines = []
    monkeypatch.setattr(check, "run_part", lambda part, python, seconds, serve: deadlines.append(seconds) or [GOOD])
    now = time.monotonic()
    monkeypatch.setattr(check.time, "monotonic", lambda: now)
    check.check([part("well", seconds), *later], HERE, None, end=now + 600)
    assert deadlines[0] == pytest.approx(expected)


def test_parts_without_time_are_named(monkeypatch):
    def slow(part, python, seconds, serve):
        clock[0] += seconds
        return [Row(part.name, "run")]

    clock = [0.0]
    monkeypatch.setattr(check, "run_part", slow)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    rows = check.check([*PARTS.values()], ALL, ALL, end=600.0).rows
    ended = {row.part: row.status for row in rows}
    assert list(ended) == list(PARTS)
    assert [name for name, status in ended.items() if status == "run"] == [
        name for name, known in PARTS.items() if not known.extra
    ]
    assert all("no time was left; run it alone" in row.reason for row in rows if row.status == "skipped")


def test_a_part_whose_process_cannot_be_started_has_failed_and_the_others_go_on():
    nowhere = Environment(Path("/nowhere/python"), ("torch", "triton", "onnx"), {}, GPU)
    broken, good = check.check([part("well", modules=("onnx",)), part("well")], HERE, nowhere, end=within()).rows
    assert (broken.part, broken.status, good) == ("well", "failed", GOOD)
    assert "no process of it could be run: [Errno 2] No such file or directory: '/nowhere/python'" in broken.reason


def test_a_file_that_cannot_be_written_is_one_sentence_before_a_part_begins(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "parts_named", lambda _: [part("hangs")])
    monkeypatch.setattr(command, "_environments", lambda _: (HERE, None))
    monkeypatch.setattr(command, "write", full)
    with pytest.raises(UserError, match=r"--out .*x.json: cannot be written \(No space left on device\)"):
        command.run(tmp_path / "x.json", (), None, 600, "x", lambda _: None)


def test_without_a_device_no_part_is_begun():
    blind = Environment(PYTHON, ("torch",))
    outcome = check.check([part("crashes"), part("well")], blind, blind, end=within())
    assert {(row.status, row.reason) for row in outcome.rows} == {("skipped", check.NO_DEVICE)}
    assert not outcome.device
    assert not outcome.failed


ALL = Environment(PYTHON, PACKAGES, {"torch": "2.9"}, GPU)
SERVE = Environment(Path("serve"), ("torch", "sglang", "triton"), {"torch": "2.9"}, GPU)
BLIND = Environment(Path("blind"), ("torch", "sglang", "triton", "nixl"), {"torch": "2.9+cpu"})


@pytest.mark.parametrize(
    ("wants", "here", "serve", "chosen", "why"),
    [
        ({"modules": ("triton",)}, HERE, SERVE, HERE, ""),
        ({"modules": ("triton",)}, BLIND, SERVE, SERVE, ""),
        ({"modules": ("triton",)}, BLIND, None, None, r"the torch of blind \(2.9\+cpu\) sees no CUDA device"),
        ({"modules": ("onnx",)}, HERE, None, None, "has no onnx; .*python.* -m pip install onnx"),
        ({}, Environment(Path("ill"), problem="ill cannot say what it has"), None, None, "ill cannot say what it has"),
        ({"modules": ("pydantic", "yaml")}, HERE, None, None, "pip install pydantic pyyaml"),
        ({}, Environment(Path("bare")), None, None, "bare has no torch"),
        ({"serves": ("sglang",)}, HERE, None, None, "no Python with SGLang was found"),
        ({"serves": ("sglang",)}, BLIND, SERVE, BLIND, ""),
        ({"serves": ("sglang", "nixl")}, HERE, SERVE, None, "serve has no nixl"),
        ({"serves": ("sglang",)}, HERE, BLIND, None, "sees no CUDA device"),
    ],
)  # fmt: skip
def test_which_python_runs_a_part(wants, here, serve, chosen, why):
    environment, reason = choose(part("well", **wants), here, serve)
    assert environment is chosen
    assert re.search(why, reason) if why else reason == ""


def test_a_python_that_says_nothing_has_nothing_and_the_reason_is_kept(tmp_path):
    for text, problem in {
        "exit 1": "cannot say what it has: exit code 1",
        "echo libcuda.so is broken >&2; exit 1": "cannot say what it has: libcuda.so is broken",
        "echo nonsense": "cannot say what it has: JSONDecodeError",
        "sleep 60": "did not say within 1 s what it has",
    }.items():
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{text}\n")
        python.chmod(0o755)
        environment = Environment.of(python, timeout_s=1 if "sleep" in text else 100)
        assert environment == Environment(python, problem=f"{python} {problem}")


def test_an_unknown_part_is_refused_with_the_valid_ones():
    with pytest.raises(UserError, match=f"--part flux: there is no such part; valid: {', '.join(PARTS)}"):
        parts_named(("kernels", "flux"))
    assert [known.name for known in parts_named(("oracle", "kernels"))] == ["kernels", "oracle"]


@pytest.mark.parametrize(("names", "code"), [(("well",), 0), (("well", "crashes"), 1)])
def test_the_command_writes_device_versions_and_rows(tmp_path, monkeypatch, names, code):
    monkeypatch.setattr(command, "parts_named", lambda _: [part(name) for name in names])
    monkeypatch.setattr(command.Environment, "of", classmethod(lambda cls, python: HERE))
    out = tmp_path / "gpu-check.json"
    assert command.run(out, names, None, 600, "pdtrim-deploy gpu-check", lambda _: None) == code
    written = json.loads(out.read_text())
    assert (written["command"], written["device"]["name"]) == ("pdtrim-deploy gpu-check", "a GPU")
    assert written["versions"]["torch"] == "2.9"
    assert written["rows"][0] == {"part": "good", "status": "run", "reason": "", "figure": GOOD.figure}
    assert os.listdir(tmp_path) == ["gpu-check.json"]


def test_on_a_machine_without_a_gpu_it_says_so_in_one_sentence_and_skips_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(command.Environment, "of", classmethod(lambda cls, python: BLIND))
    with pytest.raises(UserError, match=r"no CUDA device: .*run it on a machine with a GPU"):
        command.run(tmp_path / "x.json", (), None, 600, "x", lambda _: None)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["part"] for row in rows] == list(PARTS)
    assert {row["status"] for row in rows} == {"skipped"}
    with pytest.raises(UserError, match=r"--out .*: name a file in a folder that exists"):
        command.run(tmp_path, (), None, 600, "x", lambda _: None)


def test_a_check_that_is_stopped_leaves_a_whole_file_and_no_process(tmp_path):
    """SIGTERM, as `timeout` sends it, in a part that hangs: what ran is there, and the parts to come are named."""
    code = """
import sys; from pathlib import Path; from test_supervise import HERE, command, part
command.parts_named = lambda _: [part("well"), part("hangs"), part("prints")]
command._environments = lambda _: (HERE, None)
command.run(Path(sys.argv[1]), (), None, 600, "x", lambda text: print(text, flush=True))
"""
    out, pid = tmp_path / "x.json", tmp_path / "pid"
    process = subprocess.Popen([PYTHON, "-c", code, out], env=os.environ | {"CHILD": str(pid)}, stdout=subprocess.PIPE)
    deadline = within(120)
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    rows = json.loads(out.read_text())["rows"]
    assert [(row["part"], row["status"], row["reason"]) for row in rows] == [
        ("good", "run", ""), ("hangs", "skipped", check.STOPPED), ("prints", "skipped", check.STOPPED),
    ]  # fmt: skip
    assert ended(int(pid.read_text()), within(30))
