"""Rows that outlive their writer: whatever a kill or a full disk leaves, whole rows stand and are gone on from."""

import json
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.row_log import RowLog


def test_rows_are_there_for_the_next_process_and_found_by_their_values(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "below" / "log", ["text", 1])
    assert not log.exists
    log.append({"of": 1, "loss": 0.5}, {"of": 2, "loss": 0.25})
    log.append({"of": 1, "loss": 0.75})
    again = RowLog(tmp_path / "below" / "log", ["text", 1])
    assert again.exists
    assert again.rows == log.rows == [{"of": 1, "loss": 0.5}, {"of": 2, "loss": 0.25}, {"of": 1, "loss": 0.75}]
    assert again.find(of=1) == {"of": 1, "loss": 0.75}, "the newest"
    assert again.find(of=2, loss=0.5) is None
    assert RowLog().rows == []


def test_opening_changes_nothing_and_other_rows_go_with_the_first_of_our_own(tmp_path: Path) -> None:
    RowLog(tmp_path / "log", "text").append({"n": 1})
    before = (tmp_path / "log").read_bytes()
    other = RowLog(tmp_path / "log", "other text")
    assert (other.exists, other.rows) == (False, [])
    assert (tmp_path / "log").read_bytes() == before
    other.append({"n": 2})
    assert RowLog(tmp_path / "log", "other text").rows == [{"n": 2}]
    assert RowLog(tmp_path / "log", "text").rows == []
    other.restart()
    assert RowLog(tmp_path / "log", "other text").rows == []


def test_every_place_to_be_killed_at_leaves_the_whole_rows(tmp_path: Path) -> None:
    RowLog(tmp_path / "log").append({"n": 0}, {"n": 1}, {"n": 2})
    data = (tmp_path / "log").read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        (tmp_path / "log").write_bytes(data[:size])
        log = RowLog(tmp_path / "log")
        assert len(log.rows) == max(0, sum(end <= size for end in ends) - 1)
        log.append({"n": "next"})
        assert RowLog(tmp_path / "log").rows == log.rows


def test_whole_rows_are_never_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill just then would lose them."""
    RowLog(tmp_path / "log").append({"n": 0})
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"n": 1, "lo')
    real = Path.open

    def opened(self: Path, mode: str = "r", *more: object, **named: object) -> object:
        assert "w" not in mode
        return real(self, mode, *more, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    RowLog(tmp_path / "log").append({"n": 2})
    assert RowLog(tmp_path / "log").rows == [{"n": 0}, {"n": 2}]


def test_what_follows_a_damaged_row_does_not_count(tmp_path: Path) -> None:
    RowLog(tmp_path / "log").append({"n": 0}, {"n": 1}, {"n": 2})
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    for damage in (b"\xff\n", b"[1]\n", b"\n"):
        (tmp_path / "log").write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
        assert RowLog(tmp_path / "log").rows == [{"n": 0}]


def test_a_row_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "log").stat().st_size))
    log = RowLog(tmp_path / "log")
    log.append({"n": 0})
    log.append({"n": 1})
    assert len(synced) == 2
    assert synced[-1] == (tmp_path / "log").stat().st_size > synced[0]


def test_a_disk_that_is_full_is_one_sentence_and_half_a_row_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RowLog(tmp_path / "log")
    log.append({"n": 0})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"^cannot write .*log \(No space left on device\); [^\n]*goes on where it"):
            log.append({"n": 1})
    log.append({"n": 2})
    assert RowLog(tmp_path / "log").rows == log.rows == [{"n": 0}, {"n": 2}]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        RowLog(tmp_path / "file" / "below").append({})


def test_a_value_is_made_once_and_is_the_same_read_or_made(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, tuple[int, ...]]:
        calls.append(1)
        return {"pair": (1, 2)}

    log = RowLog(tmp_path / "log")
    assert [log.value("a", make), log.value("a", make)] == [{"pair": [1, 2]}] * 2
    assert RowLog(tmp_path / "log").value("a", make) == {"pair": [1, 2]}
    assert len(calls) == 1
    assert json.loads((tmp_path / "log").read_text().splitlines()[1])["name"] == "a"
