"""The documentation builds without a warning, and every command that it or the README shows exists as shown."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from shown import HOW, OTHERS, ROOT, bare, how, shown

from pdtrim_deploy.cli import cli

MAKE_TARGETS = set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the docs environment")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("reference"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    reference = tmp_path / "docs" / "reference"
    subprocess.run([sys.executable, ROOT / "tools" / "reference.py", reference], check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING  -" not in done.stderr
    page = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "pdtrim-deploy deploy render" in page
    assert "pdtrim_kv_wire_bytes" in (tmp_path / "site" / "reference" / "metrics" / "index.html").read_text()
    (tmp_path / "docs" / "tutorial.md").write_text("[gone](nowhere.md)\n")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def check(line: str) -> None:
    """Raises click.UsageError or AssertionError unless the command exists with these options."""
    line = re.split(r" [|>;#]|  +", line.replace("\\|", "|"))[0]
    words = shlex.split(line.replace("[", "").replace("]", ""))
    if words[0] in OTHERS:
        return
    if words[0] == "make":
        for target in (word for word in words[1:] if "=" not in word):
            assert target in MAKE_TARGETS or target.startswith("bench-"), f"make has no target {target}"
        return
    for recipe in (word for word in words if word.startswith("recipes/") and "*" not in word):
        assert (ROOT / recipe).exists(), recipe
    partial = any("..." in word for word in words)
    context = cli.make_context("pdtrim-deploy", [word for word in words[1:] if word != "..."])
    while isinstance(context.command, click.Group):
        name, *rest = [*context._protected_args, *context.args]
        for choice in name.split("|"):  # `recipe show|validate`: all of them
            command = context.command.get_command(context, choice)
            assert command is not None, f"{context.command_path} has no command {choice}"
        assert command is not None
        if partial or not rest:
            inner = click.Context(command, parent=context, resilient_parsing=True)
            command.make_parser(inner).parse_args(args=list(rest))
            return
        context = command.make_context(name, rest, parent=context)


def test_commands_were_found() -> None:
    files = {file for file, _ in shown()}
    assert {"README.md", "docs/tutorial.md", "CONTRIBUTING.md", "deploy/README.md"} <= files
    assert len(shown()) > 40


@pytest.mark.parametrize(("file", "line"), shown())
def test_a_command_that_is_shown_exists(file: str, line: str) -> None:
    check(line)


@pytest.mark.parametrize(("file", "line"), shown())
def test_a_command_that_is_shown_is_tried(file: str, line: str) -> None:
    trial = how(line)
    assert trial is not None, f"{file} shows it; say in tests/docs/commands.yaml how it is tried: {bare(line)}"
    if "bench" in trial:
        assert (ROOT / "benchmarks" / f"{trial['bench']}.py").exists()
    if {"gpu", "cluster"} & set(trial):
        assert re.search("Not run (on a cluster )?yet|<!-- ran: ", (ROOT / file).read_text())


def test_no_command_is_tried_that_is_not_shown() -> None:
    assert set(HOW) <= {bare(line) for _, line in shown()}


@pytest.mark.parametrize("line", HOW)
def test_what_tries_a_command_exists(line: str) -> None:
    trial = HOW[line]
    (kind,) = set(trial) - {"codes"}
    if kind == "test":
        file, _, name = trial["test"].partition("::")
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text if name else "def test_" in text
    elif kind == "long":
        assert (ROOT / trial["long"]).exists()
        assert line.removeprefix("make ") in (ROOT / trial["long"]).read_text() or "pdtrim-deploy" in line
    elif kind == "ci":
        assert "make test\n" in (ROOT / ".ci" / "run").read_text()
        parts = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for part in (
            "-m pytest --durations=5 tests --ignore",
            "tests/pdtrim_sglang",
            "tests/docs",
            "tests/integration -m",
        ):
            assert part in parts, f"make test leaves out {part}"
    elif kind == "make":  # what it would do, without doing it
        done = subprocess.run(["make", "-n", line.split()[1]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert trial["make"] in done.stdout
    else:
        assert kind in {"run", "gpu", "cluster", "picture"}


@pytest.mark.parametrize(
    "line",
    [
        "pdtrim-deploy biuld recipes/smollm2-demo.yaml --out x",
        "pdtrim-deploy build recipes/smollm2-demo.yaml --ouut x",
        "pdtrim-deploy build recipes/gone.yaml --out x",
        "pdtrim-deploy serve out/bundle --device tpu",
        "pdtrim-deploy deploy render out/bundle --to swarm",
        "make coffee",
    ],
)
def test_a_wrong_command_would_be_seen(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check(line)
