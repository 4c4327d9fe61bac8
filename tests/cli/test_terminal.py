"""The command line in a real terminal: Ctrl-C at every stage of every command; colour is for terminals alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sse_server import Behaviour, serve
from terminal import CTRL_C, Terminal

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli import main
from pdtrim_deploy.cli.interrupt import OTHERWISE, RESUME
from pdtrim_deploy.doctor.packages import wanted_version

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests" / "serving" / "fake_python.py"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text").mkdir()
    for n in range(12):
        (folder / "text" / f"{n}.txt").write_text(f"{n} quick brown foxes jump over the lazy dog " * 60)
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": f"dir:{folder / 'text'}", "sequences": 2, "length": 256},
        "evaluation": {"corpus": f"dir:{folder / 'text'}", "sequences": 2, "prompt_tokens": 64},
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": {"method": "attention-mass", "sparse_layers": 2, "n_first": 2, "n_last": 8},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def bundle(recipe_file: Path) -> Path:
    """Built by the test of Ctrl-C in a build, or here."""
    out = recipe_file.parent / "bundle"
    if not (out / "COMPLETE").exists():
        with pytest.raises(SystemExit) as ended:
            main(["build", str(recipe_file), "--out", str(out), "--cache-dir", str(recipe_file.parent / "cache")])
        assert not ended.value.code
    return out


@pytest.fixture
def serve_python(tmp_path: Path) -> Iterator[Path]:
    """A serve environment that passes the doctor, with fake programs; none may be running at the end."""
    diagnosis = subprocess.run(
        [sys.executable, "-m", "pdtrim_sglang.diagnosis"], capture_output=True, text=True, check=True
    )
    report = json.loads(diagnosis.stdout) | {"plugin": True, "kernels": "stub"}
    for kind in ("targets", "imports"):
        report[kind] = dict.fromkeys(report[kind], True)
    report["packages"] = {name: wanted_version(name, "serve")[0] or "1" for name in report["packages"]}
    (tmp_path / "said.json").write_text(json.dumps(report))
    python = tmp_path / "python"
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(FAKE))}"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *diagnosis*) cat {tmp_path}/said.json;; *) exec {program} "$@";; esac\n'
    )
    python.chmod(0o755)
    yield python
    deadline = time.monotonic() + 30
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:  # those that were killed need a moment
        time.sleep(0.1)
    for pid in left:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert list(left.values()) == []


def programs_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a path in `folder`."""
    return list(processes_of(folder).values())


def processes_of(folder: Path) -> dict[int, str]:
    """The same by process id."""
    lines = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            lines[int(entry)] = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return {pid: line for pid, line in lines.items() if str(folder) in line and " -m pytest" not in line}


def run(*args: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdtrim_deploy", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]


def stopped(terminal: Terminal, command: str, result: Path | None = None) -> bool:
    """Press Ctrl-C: one sentence that says how to go on, no traceback, the shell's code for it.

    Where C code saw the KeyboardInterrupt first (torch, while it is imported), Python ends itself by SIGINT after all
    of that: the same code in a shell.

    False where it was too late, on a busy machine: the command's result was there already.
    """
    with contextlib.suppress(OSError):  # it has ended
        terminal.press(CTRL_C)
    code = terminal.ended()
    if result is not None and result.exists():
        return False
    assert code in (130, -signal.SIGINT), terminal.text
    assert terminal.text.rstrip().endswith(f"pdtrim-deploy: stopped by Ctrl-C; {RESUME.get(command, OTHERWISE)}")
    assert "Traceback" not in terminal.text
    return True


def test_a_build_is_stopped_at_its_steps_and_goes_on(recipe_file: Path) -> None:
    out = recipe_file.parent / "bundle"
    args = ("build", recipe_file, "--out", out, "--cache-dir", recipe_file.parent / "cache")
    for step in ("prune", "select-kv", "prefill"):  # all that a KeyboardInterrupt falls into: imports, torch, writing
        for _ in range(5):
            terminal = Terminal(*args)
            terminal.read_until(rf"{step}( \.\.\.|: (?!done))")
            if stopped(terminal, "build", out / "COMPLETE"):
                break
            shutil.rmtree(out)
        else:
            pytest.fail(f"the build went on to its end: {terminal.text}")
    again = Terminal(*args)
    assert again.ended() == 0, again.text
    assert "done before" in again.text
    assert Bundle.open(out).verify() == []
    assert not (out / ".build").exists()


@pytest.mark.parametrize(("error", "shown"), [("KeyboardInterrupt", False), ("ValueError", True)])
def test_ctrl_c_that_falls_where_nothing_can_be_raised_shows_no_traceback(error: str, shown: bool) -> None:
    """Python runs callbacks of weak references this way, also those of its import system."""
    program = f"""
from pdtrim_deploy.cli.interrupt import install
class Last:
    def __del__(self):
        raise {error}
install()
Last()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("Traceback" in done.stderr) is shown


BLOCKED = {
    "recipe show": ["recipe", "show", "RECIPE"],
    "recipe validate": ["recipe", "validate", "RECIPE"],
    "plan": ["plan", "RECIPE"],
    "build": ["build", "RECIPE", "--out", "OUT"],
    "build --dry-run": ["build", "RECIPE", "--out", "OUT", "--dry-run"],
    "demo": ["demo", "RECIPE", "--out", "OUT"],
    "doctor": ["doctor", "RECIPE"],
    "verify": ["verify", "BUNDLE"],
    "inspect": ["inspect", "BUNDLE"],
    "eval": ["eval", "BUNDLE"],
    "serve": ["serve", "BUNDLE"],
    "fidelity": ["fidelity", "BUNDLE"],
    "loadtest": ["loadtest", "BUNDLE"],
    "compare": ["compare", "BUNDLE", "http://127.0.0.1:1"],
    "report": ["report", "BUNDLE", "--out", "OUT"],
    "deploy render": ["deploy", "render", "BUNDLE", "--out", "OUT"],
}


@pytest.mark.parametrize("name", BLOCKED)
def test_while_it_reads(name: str, bundle: Path, tmp_path: Path) -> None:
    """A named pipe without a writer stops every command at its first file."""
    held = tmp_path / "held"
    shutil.copytree(bundle, held)
    (held / "plan.json").unlink()
    pipe = held / "plan.json" if "BUNDLE" in BLOCKED[name] else tmp_path / "held.yaml"
    os.mkfifo(pipe)
    places = {"RECIPE": tmp_path / "held.yaml", "BUNDLE": held, "OUT": tmp_path / "out"}
    terminal = Terminal(*(places.get(word, word) for word in BLOCKED[name]))
    held_open = opened(pipe, terminal)
    stopped(terminal, name.split(maxsplit=1)[0])
    os.close(held_open)
    assert not (tmp_path / "out").exists()


def opened(pipe: Path, terminal: Terminal) -> int:
    """The pipe's writing end once a reader waits: between open and read Python would miss a signal."""
    end = time.monotonic() + 120
    while True:
        try:
            held_open = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            terminal.read()
            assert time.monotonic() < end, terminal.text
            time.sleep(0.02)
    asleep = 0  # times in a row: it was woken by the open, and sleeps again in its read
    while asleep < 10:
        asleep = asleep + 1 if state(terminal.pid) == "S" else 0
        assert time.monotonic() < end, terminal.text
        time.sleep(0.03)
    return held_open


def state(pid: int) -> str:
    """Of a process: R while it computes or waits for a processor, S while it waits for something else."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_eval_writes_all_or_nothing(bundle: Path, recipe_file: Path) -> None:
    result = bundle / "reports" / "eval.json"
    for _ in range(5):
        terminal = Terminal("eval", bundle, "--cache-dir", recipe_file.parent / "cache")
        terminal.read_until(r"eval \.\.\.")
        if stopped(terminal, "eval", result):
            break
        result.unlink()
    else:
        pytest.fail(f"eval wrote its report each time: {terminal.text}")


def faults(bundle: Path, stage: str, fault: str) -> None:
    for folder in ("prefill", "decode"):
        (bundle / folder / "faults.txt").write_text(f"{stage}: {fault}\n")


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "b")
    faults(tmp_path / "b", "decode", "never-healthy")
    return tmp_path / "b"


@pytest.mark.parametrize("command", ["serve", "fidelity", "loadtest", "compare", "demo"])
def test_while_servers_start(command: str, served: Path, serve_python: Path, recipe_file: Path, tmp_path: Path) -> None:
    more: dict[str, list[object]] = {
        "compare": [served, "http://127.0.0.1:1"],
        "demo": [recipe_file, "--out", tmp_path / "demo", "--requests", 3, "--rounds", 3],
    }
    terminal = Terminal(command, *more.get(command, [served]), "--serve-python", serve_python)
    if command == "demo":
        terminal.read_until(r"build the dense bundle( \.\.\.|:)")
        stopped(terminal, command)
        return
    end = time.monotonic() + 120
    while len(programs_of(tmp_path)) < 3:  # the command itself and both workers
        terminal.read()
        assert time.monotonic() < end, terminal.text
        time.sleep(0.1)
    stopped(terminal, command)


def test_serve_is_stopped_while_it_serves(served: Path, serve_python: Path, tmp_path: Path) -> None:
    faults(served, "decode", "")
    args = ("serve", served, "--serve-python", serve_python, "--log-dir", tmp_path / "logs")
    terminal = Terminal(*args)
    terminal.read_until("Ctrl-C stops everything.")
    stopped(terminal, "serve")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):  # as gentle
        terminal = Terminal(*args)
        terminal.read_until("Ctrl-C stops everything.")
        os.kill(terminal.pid, number)
        assert terminal.ended() == code, terminal.text
        assert "Traceback" not in terminal.text
        assert programs_of(tmp_path) == []


@pytest.mark.parametrize("command", ["loadtest", "compare"])
def test_under_load(command: str) -> None:
    behaviour = Behaviour(hang=True)
    with serve(behaviour) as url, serve(behaviour) as other_url:
        terminal = Terminal(command, url, *([other_url] if command == "compare" else []))
        end = time.monotonic() + 120
        while not behaviour.in_flight:
            terminal.read()
            assert time.monotonic() < end, terminal.text
            time.sleep(0.05)
        stopped(terminal, command)


def test_the_doctor_is_stopped_while_it_asks(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    terminal = Terminal("doctor", "--serve-python", python)
    terminal.read_until("prometheus-client")
    time.sleep(0.3)
    stopped(terminal, "doctor")


def test_colour_and_live_lines_are_for_terminals_alone(bundle: Path, recipe_file: Path) -> None:
    for args, live in (
        (("doctor", "--for", "build"), "\x1b[32mok"),
        (("inspect", bundle), "\x1b["),
        (("plan", "llama-3.1-8b"), "\x1b["),
    ):
        terminal = Terminal(*args)
        assert terminal.ended() == 0
        assert live in terminal.screen
        assert not re.search(r"\x1b\[(\d;)*[39]\d", without_colour(*args))
        assert "\x1b" not in run(*args).stdout
    piped = run("build", recipe_file, "--out", bundle, "--cache-dir", recipe_file.parent / "cache")
    assert piped.returncode == 0, piped.stderr
    assert "prune: done before" in piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr


def without_colour(*args: object) -> str:
    terminal = Terminal(*args, NO_COLOR="1")
    assert terminal.ended() == 0
    return terminal.screen
