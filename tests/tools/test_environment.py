"""Which environments `make setup` makes again or leaves alone; its commands are only recorded."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "environment.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("environment_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "build.txt").write_text("torch==2.13.0\nuv==0.13.9\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    module.commands = []

    def run(*command):
        words = [str(word) for word in command]
        module.commands.append(words)
        if words[1:3] == ["-m", "venv"]:
            python = Path(words[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(module, "run", run)
    return module


def ensure(tool):
    """Number of environments made and of commands run in one call."""
    tool.commands.clear()
    tool.Environment("build", cuda=False).ensure()
    return sum(words[1:3] == ["-m", "venv"] for words in tool.commands), len(tool.commands)


def test_what_stands_is_left_alone(tool):
    assert ensure(tool)[0] == 1
    assert ensure(tool) == (0, 0)


def test_other_pins_make_it_again_from_nothing(tool):
    ensure(tool)
    leftover = tool.ROOT / ".venv" / "build" / "leftover"
    leftover.touch()
    (tool.ROOT / "constraints" / "build.txt").write_text("torch==2.13.1\nuv==0.13.9\n")
    assert ensure(tool)[0] == 1
    assert not leftover.exists()


def test_a_set_up_that_broke_off_is_made_again(tool, monkeypatch):
    working = tool.run

    def breaks(*command):
        if "-e" in command:
            raise SystemExit("network down")
        working(*command)

    monkeypatch.setattr(tool, "run", breaks)
    with pytest.raises(SystemExit):
        ensure(tool)
    monkeypatch.setattr(tool, "run", working)
    assert ensure(tool)[0] == 1


def test_a_changed_pyproject_only_reinstalls_the_project(tool):
    ensure(tool)
    (tool.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    environments, commands = ensure(tool)
    assert (environments, commands) == (0, 1)
    assert tool.commands[0][-2:] == ["-e", "."]


@pytest.mark.parametrize("name", ["aiperf", "evals"])
def test_programs_of_others_hold_their_pins_and_not_the_project(tool, name):
    (tool.ROOT / "constraints" / f"{name}.txt").write_text("aiperf==0.13.0\nuv==0.13.9\n")
    tool.Environment(name, cuda=False).ensure()
    assert not any("-e" in words for words in tool.commands)
    assert any(words[-1].endswith(f"{name}.txt") for words in tool.commands)
    (tool.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    tool.commands.clear()
    tool.Environment(name, cuda=False).ensure()
    assert tool.commands == []


def test_a_removed_interpreter_is_noticed(tool):
    ensure(tool)
    (tool.ROOT / ".venv" / "build" / "bin" / "python").unlink()
    (tool.ROOT / ".venv" / "build" / "bin").rmdir()
    assert ensure(tool)[0] == 1


def test_every_package_is_pinned_and_no_host_is_named():
    for lock in sorted((TOOL.parents[1] / "constraints").glob("*.txt")):
        for line in lock.read_text().splitlines():
            name, _, version = line.partition("==")
            assert name, line
            assert version, line
            assert "/" not in line, line


@pytest.mark.parametrize(
    ("stops", "says"),
    [(KeyboardInterrupt(), "stopped by Ctrl-C"), (PermissionError(13, "Permission denied"), "denied")],
)
def test_what_stops_it_is_one_sentence(tool, monkeypatch, stops, says):
    def stopped(*_, **__):
        raise stops

    monkeypatch.setattr(tool.Environment, "ensure", stopped)
    monkeypatch.setattr("sys.argv", ["environment.py", "build"])
    with pytest.raises(SystemExit, match=says):
        tool.main()
