"""Lengths of requests, drawn from a load test's trace, for text that has none of its own."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora import Document
from pdtrim_deploy.loadtest.trace import rows


def with_lengths(documents: Iterable[Document], trace: Path, seed: int) -> tuple[Document, ...]:
    """Each document that is no conversation cut to the prompt length of a request of `trace` (Mooncake's format).

    UserError where the trace cannot be read.
    """
    if not trace.is_file():
        raise UserError(f"{trace}: no such file; give calibration.lengths a trace as `load-test --trace` reads it")
    lengths = [row.input_tokens for row in rows(trace)]
    return tuple(
        document
        if document.messages
        else replace(document, tokens=random.Random(f"{seed}/{document.id}").choice(lengths))
        for document in documents
    )
