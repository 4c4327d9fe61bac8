"""`parquet:PATH`: text or conversations in a Parquet file with a column `text` or `messages`.

The build environment has no pyarrow, which is large; that of the evaluations has. A process of its Python writes the
rows as JSON lines, once for each content of the file, and those are read as `jsonl:` is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.evaluation.corpora.json_lines import documents
from pdtrim_deploy.local.cache import Cache, file_sha256
from pdtrim_deploy.local.job import last_line
from pdtrim_deploy.local.own_environment import REPO
from pdtrim_deploy.local.paths import expanded

_EVALS = Path(".venv", "evals", "bin", "python")
_VERSION = 1  # of the lines
_CONVERT = """
import json, sys
import pyarrow.parquet
file = pyarrow.parquet.ParquetFile(sys.argv[1])
columns = [name for name in file.schema_arrow.names if name in ("text", "messages")]
if not columns:
    sys.exit("its columns are " + ", ".join(file.schema_arrow.names))
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
        UserError: nothing here reads Parquet, the file is none, or it has neither column.

    """

    def make(folder: Path) -> None:
        command = [str(_reader(path)), "-I", "-c", _CONVERT, str(path.absolute()), str(folder / "rows.jsonl")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise UserError(f"{path}: not read ({last_line(run.stderr)}); give Parquet with a column text or messages")

    rows = cache.entry("corpora", f"parquet-{file_sha256(path)[:16]}-{_VERSION}", make) / "rows.jsonl"
    return documents(rows, name, f"{path}: row")


def _reader(path: Path) -> Path:
    """A Python that has pyarrow."""
    if importlib.util.find_spec("pyarrow") is not None:
        return Path(sys.executable)
    for python in (REPO / _EVALS, _EVALS.absolute()):
        if python.exists():
            return python
    raise UserError(
        f"{path}: Parquet is read by the environment of the evaluations, which is not there; run: make setup-evals, or "
        f"give it as jsonl:, which pandas writes: read_parquet('{path.name}').to_json('{path.stem}.jsonl', "
        "orient='records', lines=True)"
    )
