"""`hub:OWNER/NAME/FILE[@REVISION]`: a file of a data set on the Hugging Face hub, where one can be reached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.evaluation.corpora.json_lines import documents
from pdtrim_deploy.evaluation.corpora.parquet import parquet_documents
from pdtrim_deploy.local.cache import Cache

_PLACE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)/(?P<file>[^@]+\.(?:jsonl|parquet))(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubFile:
    """A .jsonl file is read as `jsonl:` is, one of Parquet as `parquet:` is.

    Attributes:
        endpoint: address of the hub; None: that of huggingface_hub's own settings.

    """

    usage: str = "hub:OWNER/NAME/FILE"
    endpoint: str | None = None

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """Documents in the file's order; the file is kept in the hub's own cache."""
        match = _PLACE.fullmatch(place)
        if match is None or ".." in (match["revision"] or "").split("/"):
            raise UserError(
                f"hub:{place} is no .jsonl or .parquet file of a data set; give hub:OWNER/NAME/FILE[@REVISION]"
            )
        from httpx import HTTPError  # what huggingface_hub speaks HTTP with
        from huggingface_hub import hf_hub_download

        log(f"fetching {match['file']} of the data set {match['name']}")
        try:
            path = hf_hub_download(
                match["name"],
                match["file"],
                repo_type="dataset",
                revision=match["revision"],
                endpoint=self.endpoint,
                cache_dir=cache.root / "hub",
                etag_timeout=10,
            )
        except (OSError, ValueError, HTTPError) as error:  # no network, no such file, an end in the middle
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"hub:{place}: the hub gave no such file ({reason[:200]}); check its name and your network, or give a "
                f"copy of the file as {'parquet' if match['file'].endswith('.parquet') else 'jsonl'}:PATH"
            ) from None
        file, name = Path(path), Path(match["file"]).name
        return parquet_documents(file, name, cache) if name.endswith(".parquet") else documents(file, name)
