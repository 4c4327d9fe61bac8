"""Bundles whose small files are not text, or are nested without end: commands name the file and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from bare_bundle import make_bundle
from commandline import run

NO_TEXT, NO_END = b"\xff\xfe\x80", b"[" * 100_000


@pytest.mark.parametrize("command", ["verify", "inspect", "report", "plan"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("COMPLETE", NO_TEXT),
        ("manifest.json", NO_TEXT),
        ("plan.json", NO_TEXT),
        ("plan.json", NO_END),
        ("prefill/config.json", NO_TEXT),
        ("decode/config.json", NO_END),
    ],
    ids=lambda value: value if isinstance(value, str) else "no-text" if value == NO_TEXT else "no-end",
)
def test_it_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, name: str, data: bytes
) -> None:
    folder = make_bundle(tmp_path / "b").path
    (folder / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, command, folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "build the bundle again" in err
    assert sorted(tmp_path.rglob("*")) == before
