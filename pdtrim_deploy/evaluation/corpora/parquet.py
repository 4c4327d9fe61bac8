"""`parquet:PATH`: text or conversations in a Parquet file with a column `text` or `messages`.

The build environment has no pyarrow, which is large; that of the evaluations has. A process of its Python writes the
rows as JSON lines, once for each content of the file, and those are read as `jsonl:` is.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.evaluation.corpora.json_lines import documents
from pdtrim_deploy.evaluation.evals_environment import python
from pdtrim_deploy.local.cache import Cache, file_sha256
from pdtrim_deploy.local.job import dies_with, last_line
from pdtrim_deploy.local.paths import expanded

_VERSION = 1  # of the lines
_SECONDS = 3600.0  # that reading may take
_BAD_FILE = 3  # exit code
_CONVERT = """
import json, sys
import pyarrow.parquet

def refuse(why):
    print(why, file=sys.stderr)
    sys.exit(int(sys.argv[3]))

try:
    file = pyarrow.parquet.ParquetFile(sys.argv[1])
except pyarrow.ArrowInvalid as error:
    refuse(error)
columns = [name for name in file.schema_arrow.names if name in ("text", "messages")]
if not columns:
    refuse("its columns are " + ", ".join(file.schema_arrow.names))
with open(sys.argv[2], "w", encoding="utf-8") as lines:
    for batch in file.iter_batches(1024, columns=columns):
        for row in batch.to_pylist():
            known = {name: value for name, value in row.items() if value is not None}
            lines.write((json.dumps(known) if known else "") + "\\n")
"""


class ParquetFile:
    """Each row is a document, as a line of `jsonl:` is."""

    usage = "parquet:PATH"

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """Documents in the file's order, named by their rows."""
        path = expanded(place)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give parquet: a file with a column text or messages")
        return parquet_documents(path, path.name, cache)


def parquet_documents(path: Path, name: str, cache: Cache) -> tuple[Document, ...]:
    """Of the rows of a file; ids begin with `name`.

    Raises:
        UserError: nothing here reads Parquet, the file is none, it has neither column, or it was not read to its end.

    """

    def make(folder: Path) -> None:
        places = (str(path.absolute()), str(folder / "rows.jsonl"))
        command = [str(_reader(path)), "-I", "-c", _CONVERT, *places, str(_BAD_FILE)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_SECONDS,
                preexec_fn=dies_with(os.getpid()),  # one system call, no lock
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"{path}: not read within {_SECONDS:g} s; divide it into smaller files") from None
        if run.returncode == _BAD_FILE:
            raise UserError(f"{path}: not read ({last_line(run.stderr)}); give Parquet with a column text or messages")
        if run.returncode:
            raise UserError(
                f"{path}: the process that reads Parquet ended with exit code {run.returncode} "
                f"({last_line(run.stderr)}); see to that, or {_as_lines(path)}"
            )

    rows = cache.entry("corpora", f"parquet-{file_sha256(path)[:16]}-{_VERSION}", make) / "rows.jsonl"
    return documents(rows, name, f"{path}: row")


def _reader(path: Path) -> Path:
    """A Python that has pyarrow."""
    try:
        return python()
    except UserError as error:
        raise UserError(
            f"{path}: Parquet is read by the environment of the evaluations ({error}); make it, or {_as_lines(path)}"
        ) from None


def _as_lines(path: Path) -> str:
    return (
        f"give the file as jsonl:, which pandas writes: read_parquet('{path.name}').to_json('{path.stem}.jsonl', "
        "orient='records', lines=True)"
    )
