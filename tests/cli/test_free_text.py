"""Options with free text: values that no worker accepts are refused before anything is started or written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bare_bundle import make_bundle
from commandline import run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "b").path


@pytest.mark.parametrize("command", ["serve", "deploy render"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo=1", "no such option; valid: staging_bytes, "),
        ("stall_seconds", "give KEY=VALUE"),
        ("devices=[a", "the value is no YAML; put text in quotes"),
        ("devices=2024-01-01", "input should be a valid string; mend the value"),
        ("devices=!!bool x", "the value is no YAML; put text in quotes"),
        ("devices=2024-13-01", "the value is no YAML; put text in quotes"),
        pytest.param("devices=" + "[" * 1500, "the value is no YAML; put text in quotes", id="brackets"),
        ("devices=[a, b]", "input should be a valid string"),
        ("stall_seconds=0", "input should be greater than 0"),
        ("stall_seconds=.inf", "input should be a finite number"),
        ("staging_bytes=1e9x", "input should be a valid integer"),
        ("protocol=udp", "input should be 'tcp' or 'rdma'"),
    ],
)
def test_what_a_transport_cannot_be_told(
    capsys: pytest.CaptureFixture[str], bundle: Path, command: str, text: str, says: str
) -> None:
    more = ("--serve-python", sys.executable) if command == "serve" else ()
    code, out, err = run(capsys, *command.split(), bundle, *more, "--dry-run", "--transport-option", text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--transport-option {text!r}: {says}" in err


@pytest.mark.parametrize("text", ["port=20000", "announce=gateway:6000"])
def test_decode_workers_of_one_machine_cannot_share_a_port(
    capsys: pytest.CaptureFixture[str], bundle: Path, text: str
) -> None:
    command = ("serve", bundle, "--serve-python", sys.executable, "--dry-run", "--transport-option", text)
    assert run(capsys, *command)[0] == 0
    code, out, err = run(capsys, *command, "--decode", "2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--transport-option {text.partition('=')[0]}: the 2 decode workers" in err


def test_a_dtype_that_no_worker_has(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    for dtype in ("bf16", ""):
        code, out, err = run(capsys, "serve", bundle, "--serve-python", sys.executable, "--dry-run", "--dtype", dtype)
        assert (code, out) == (2, "")
        assert "Invalid value for '--dtype'" in err


def test_what_it_can_be_told(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    pairs = ("stall_seconds=3", "announce=gateway:6000", "devices='2024-01-01'", "connections=8")
    arguments = [word for pair in pairs for word in ("--transport-option", pair)]
    code, out, _ = run(capsys, "serve", bundle, "--serve-python", sys.executable, "--dry-run", "--json", *arguments)
    words = json.loads(out)["decode-0"]
    told_worker = json.loads(words[words.index("--json-model-override-args") + 1])["pdtrim_transport"]
    expected = {"stall_seconds": 3, "announce": "gateway:6000", "devices": "2024-01-01", "connections": 8}
    assert (code, told_worker) == (0, expected)


@pytest.mark.parametrize("option", ["--worker-args", "--router-args"])
def test_words_are_split_as_a_shell_does(capsys: pytest.CaptureFixture[str], bundle: Path, option: str) -> None:
    command = ("serve", bundle, "--serve-python", sys.executable, "--dry-run", "--json", option)
    code, out, _ = run(capsys, *command, "--foo 'bar baz'")
    program = "router" if option == "--router-args" else "prefill-0"
    assert (code, json.loads(out)[program][-2:]) == (0, ["--foo", "bar baz"])
    code, out, err = run(capsys, *command, "--foo 'bar")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no closing quotation; quote its words as in a shell" in err
