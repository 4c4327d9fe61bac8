"""Calibration text in Parquet: the same documents as the same rows as JSON lines, or one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora import load, parquet
from pdtrim_deploy.evaluation.evals_environment import python

REPO = Path(__file__).resolve().parents[2]
EVALS = REPO / ".venv" / "evals" / "bin" / "python"
ROWS = [
    {"text": "a first text", "messages": None},
    {"text": None, "messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]},
    {"text": None, "messages": None},
    {"text": "a second text", "messages": None},
    {"text": "a third text", "messages": None},
]
WRITE = """
import json, sys, pyarrow, pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json.load(sys.stdin)), sys.argv[1])
"""
reads = pytest.mark.skipif(not EVALS.exists(), reason="needs .venv/evals: make setup-evals")


def written(rows, path):
    subprocess.run([EVALS, "-c", WRITE, path], input=json.dumps(rows), text=True, check=True)
    return path


@reads
def test_rows_are_read_as_lines_are(tmp_path, cache, monkeypatch):
    file, lines = written(ROWS, tmp_path / "data.parquet"), tmp_path / "data.jsonl"
    kept = [{name: value for name, value in row.items() if value} for row in ROWS]
    lines.write_text("".join((json.dumps(row) if row else "") + "\n" for row in kept))
    rows, known = load(f"parquet:{file}", cache).documents, load(f"jsonl:{lines}", cache).documents
    assert len(rows) == 4
    assert [(d.text, d.messages, d.group) for d in rows] == [(d.text, d.messages, d.group) for d in known]
    assert rows[1].id == "data.parquet#000002"
    monkeypatch.setattr(parquet, "python", lambda: Path(sys.executable))  # it has no pyarrow
    assert load(f"parquet:{file}", cache).documents == rows  # from the cache
    file.write_bytes(file.read_bytes() + b"PAR1")
    with pytest.raises(UserError, match=r"ended with exit code 1 \(ModuleNotFoundError.*give the file as jsonl"):
        load(f"parquet:{file}", cache)


@reads
def test_reading_that_takes_too_long_is_ended(tmp_path, cache, monkeypatch):
    file = written(ROWS[1:], tmp_path / "data.parquet")  # no other test's, which the cache has
    monkeypatch.setattr(parquet, "_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"data.parquet: not read within 0.01 s; divide it into smaller files"):
        load(f"parquet:{file}", cache)


@reads
@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "x"}], r"data.parquet: not read \(its columns are prompt\); give Parquet with a column text or"),
        ([{"text": 3}], r"data.parquet: row 1: text is int, not a string"),
        ([{"text": " "}], r"data.parquet: no row has text in it"),
        ([{"messages": [{"role": "me", "content": "x"}]}], r"data.parquet: row 1: message 1 has the role 'me'"),
    ],
)
def test_what_is_no_text_is_one_sentence(rows, sentence, tmp_path, cache):
    file = written(rows, tmp_path / "data.parquet")
    with pytest.raises(UserError, match=sentence):
        load(f"parquet:{file}", cache)


@reads
def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path, cache):
    file = tmp_path / "data.parquet"
    file.write_text("text\n")
    with pytest.raises(UserError, match=r"data.parquet: not read \([^\n]*\); give Parquet with a column text"):
        load(f"parquet:{file}", cache)
    with pytest.raises(UserError, match=r"no such file; give parquet: a file with a column"):
        load(f"parquet:{tmp_path / 'none'}", cache)


def test_without_a_reader_it_says_how_to_convert(tmp_path, cache, monkeypatch):
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setattr(parquet, "python", lambda: python(tmp_path))  # no clone
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python3 -m venv .*; make it, or give the file as jsonl:, .*'data.jsonl'"):
        load(f"parquet:{file}", cache)
