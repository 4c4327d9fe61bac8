"""Only complete entries: damage is detected, failures leave nothing, racing processes make an entry once."""

import json
import multiprocessing
import os
import time

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import MARKER, Cache, atomic_directory


def make_slowly(entry):
    with (entry.parent / "made.log").open("a") as log:
        log.write("made\n")
    (entry / "half").write_text("1")
    time.sleep(0.3)
    (entry / "whole").write_text("2")


def race(root):
    path = Cache(root).entry("kind", "key", make_slowly)
    assert (path / "whole").read_text() == "2"


def counting(calls):
    def make(entry):
        calls.append(entry)
        (entry / "sub").mkdir()
        (entry / "sub" / "a").write_text("aaaa")
        (entry / "b").write_text("bbbb")

    return make


def damage_bytes(path):
    (path / "sub" / "a").write_text("aaab")


def damage_length(path):
    (path / "sub" / "a").write_text("a")


def lose_file(path):
    (path / "b").unlink()


def add_file(path):
    (path / "c").write_text("c")


def lose_marker(path):
    (path / MARKER).unlink()


def break_marker(path):
    (path / MARKER).write_text('{"files": {')


@pytest.mark.parametrize("damage", [damage_bytes, damage_length, lose_file, add_file, lose_marker, break_marker])
def test_a_damaged_entry_is_made_again(damage, tmp_path):
    calls = []
    cache = Cache(tmp_path)
    path = cache.entry("kind", "key", counting(calls))
    assert cache.entry("kind", "key", counting(calls)) == path
    assert len(calls) == 1
    damage(path)
    assert cache.entry("kind", "key", counting(calls)) == path
    assert len(calls) == 2
    assert (path / "sub" / "a").read_text() == "aaaa"
    assert not (path / "c").exists()
    assert {p.name for p in path.parent.iterdir()} == {"key", ".key.lock"}


def test_a_copied_cache_is_still_whole(tmp_path):
    calls = []
    path = Cache(tmp_path).entry("kind", "key", counting(calls))
    os.utime(path / "b", (1, 1))
    Cache(tmp_path).entry("kind", "key", counting(calls))
    assert len(calls) == 1


def test_failure_leaves_nothing(tmp_path):
    def fail(entry):
        (entry / "half").write_text("1")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Cache(tmp_path).entry("kind", "key", fail)
    assert [p.name for p in (tmp_path / "kind").iterdir()] == [".key.lock"]


@pytest.mark.parametrize("name", [".key.new-dead", ".key.old-dead"])
@pytest.mark.parametrize("complete", [False, True])
def test_leftovers_of_a_killed_process_go(name, complete, tmp_path):
    """Also beside an entry that is whole: the process died as it removed what it had replaced."""
    if complete:
        Cache(tmp_path).entry("kind", "key", counting([]))
    (tmp_path / "kind" / name / "entry").mkdir(parents=True)
    (tmp_path / "kind" / ".key2.old-x").mkdir()
    Cache(tmp_path).entry("kind", "key", counting([]))
    assert {p.name for p in (tmp_path / "kind").iterdir()} == {"key", ".key.lock", ".key2.old-x"}


def replaces_slowly(entry):
    old = entry.parent / ".key.old-alive"
    old.mkdir()
    time.sleep(0.5)
    assert old.is_dir()
    old.rmdir()


def test_folders_of_a_living_process_stay(tmp_path):
    """It holds the entry's lock: whoever wants the entry waits for it."""
    alive = multiprocessing.get_context("fork").Process(
        target=Cache(tmp_path).entry, args=("kind", "key", replaces_slowly)
    )
    alive.start()
    while not (tmp_path / "kind" / ".key.old-alive").exists():
        time.sleep(0.01)
    Cache(tmp_path).entry("kind", "key", counting([]))
    alive.join()
    assert alive.exitcode == 0


def test_two_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=race, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "kind" / "made.log").read_text() == "made\n"


def test_marker_names_every_file(tmp_path):
    path = Cache(tmp_path).entry("kind", "key", counting([]))
    files = json.loads((path / MARKER).read_text())["files"]
    assert set(files) == {"b", "sub/a"}
    assert files["b"]["sha256"] == "81cc5b17018674b401b42f35ba07bb79e211239c23bffe658da1577e3e646877"


def test_unwritable_root_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot fill the cache"):
        Cache(tmp_path / "file").entry("kind", "key", counting([]))


def test_atomic_directory_keeps_the_old_on_failure(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def interrupted():
        with atomic_directory(target) as folder:
            (folder / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
    with atomic_directory(target) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_default_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.default().root == tmp_path / "pdtrim-deploy"
