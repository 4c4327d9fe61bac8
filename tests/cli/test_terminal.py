"""The command line in a real terminal: Ctrl-C is a key there, colour and one live line are shown."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pdtrim_deploy.bundle import Bundle

CTRL_C = b"\x03"


class Terminal:
    """A command in a terminal of its own; `screen` is all that it wrote."""

    def __init__(self, *args: object) -> None:
        self.screen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests are a background job
            os.execv(sys.executable, [sys.executable, "-m", "pdtrim_deploy", *map(str, args)])

    def read_until(self, text: str | None, seconds: float = 60) -> None:
        """Until `text` is on the screen, or the command has ended."""
        end = time.monotonic() + seconds
        while text is None or text not in self.screen:
            assert time.monotonic() < end, self.screen
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def ended(self) -> int:
        """Its exit code."""
        self.read_until(None)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    (tmp_path / "text").mkdir()
    for n in range(12):
        (tmp_path / "text" / f"{n}.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": f"dir:{tmp_path / 'text'}", "sequences": 2, "length": 256},
        "pruning": {"method": "greedy", "prefill_blocks": 2, "decode_blocks": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "tiny.yaml"


def test_ctrl_c_leaves_a_build_that_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    args = ("build", recipe_file, "--out", out, "--cache-dir", tmp_path / "cache")
    terminal = Terminal(*args)
    terminal.read_until("prune ...")  # torch is imported now, which swallows a KeyboardInterrupt
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.screen
    assert "stopped by Ctrl-C; run the same command again to go on" in terminal.screen
    assert "Traceback" not in terminal.screen
    assert not (out / "COMPLETE").exists()
    again = Terminal(*args)
    assert again.ended() == 0, again.screen
    assert Bundle.open(out).verify() == []
    assert not (out / ".build").exists()


def test_colour_is_for_terminals_alone() -> None:
    terminal = Terminal("doctor", "--for", "build")
    assert terminal.ended() == 0
    assert "\x1b[32mok" in terminal.screen
    command = [sys.executable, "-m", "pdtrim_deploy", "doctor", "--for", "build"]
    piped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stdout
