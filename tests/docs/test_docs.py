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

from pdtrim_deploy.cli import cli

ROOT = Path(__file__).parents[2]
WRITTEN = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "deploy" / "README.md"]
    if "reference" not in path.parts
)
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


def commands(text: str) -> list[str]:
    """Every `pdtrim-deploy ...` and `make ...`: lines of code blocks, with their continuations, and inline code."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [re.sub(r"^(\$ |\.venv/build/bin/)", "", line) for line in [*lines, *inline]]
    return [line for line in found if re.match(r"(pdtrim-deploy|make) [a-z-]", line)]


def shown() -> list[tuple[str, str]]:
    return [(str(p.relative_to(ROOT)), line) for p in WRITTEN for line in dict.fromkeys(commands(p.read_text()))]


def check(line: str) -> None:
    """Raises click.UsageError or AssertionError unless the command exists with these options."""
    line = re.split(r" [|>;#]|  +", line.replace("\\|", "|"))[0]
    words = shlex.split(line.replace("[", "").replace("]", ""))
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


@pytest.mark.parametrize(
    "line",
    [
        "pdtrim-deploy biuld recipes/smollm2-demo.yaml --out x",
        "pdtrim-deploy build recipes/smollm2-demo.yaml --ouut x",
        "pdtrim-deploy build recipes/gone.yaml --out x",
        "pdtrim-deploy serve out/bundle --device tpu",
        "pdtrim-deploy deploy render out/bundle",
        "make coffee",
    ],
)
def test_a_wrong_command_would_be_seen(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check(line)
