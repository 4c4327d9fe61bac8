"""`jsonl:PATH`: the user's own text or conversations, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import ROLES, Document, Log, conversation
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.paths import expanded

_ALLOWED = 'allowed: {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


class JSONLines:
    """Each line is a document: its `text`, or its `messages`, which the checkpoint's chat template will render.

    Lines that begin alike, by the same text or the same first words of a user, fall into the same split: later turns of
    a conversation hold its earlier ones.
    """

    usage = "jsonl:PATH"

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """Documents in the file's order, named by their lines."""
        path = expanded(place)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give jsonl: a file of JSON objects, one a line")
        return documents(path, path.name)


def documents(path: Path, name: str, line: str = "") -> tuple[Document, ...]:
    """Of the lines of a file; ids begin with `name`.

    What is wrong with one is said of `line` and its number: by default of a line of `path`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert it") from None
    line = line or f"{path}: line"
    read_documents = tuple(_documents(lines, line, name))
    if not read_documents:
        source, _, kind = line.rpartition(": ")
        raise UserError(f"{source}: no {kind} has text in it; {_ALLOWED}")
    return read_documents


def _documents(lines: list[str], kind: str, name: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{kind} {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not JSON; {_ALLOWED}") from None
        document = read(row, f"{name}#{number:06}", where)
        if any("\ud800" <= letter <= "\udfff" for letter in document.text):
            raise UserError(f"{where} has half of a pair of surrogates, which is no text; mend the line")
        if document.text.strip():
            yield document


def read(row: Any, name: str, where: str) -> Document:
    """The document of one object; UserError begins with `where`."""
    keys = [key for key in ("text", "messages") if isinstance(row, dict) and row.get(key) is not None]
    if len(keys) != 1:
        what = "both text and messages" if keys else "neither text nor messages"
        raise UserError(f"{where} has {what}; {_ALLOWED}")
    if keys == ["text"]:
        if not isinstance(row["text"], str):
            raise UserError(f"{where}: text is {type(row['text']).__name__}, not a string; {_ALLOWED}")
        return Document(name, row["text"], group=row["text"], line=where)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is no list of messages; {_ALLOWED}")
    pairs = [_message(message, number, where) for number, message in enumerate(messages, 1)]
    texts = [content for role, content in pairs if role == "user"] + [content for _, content in pairs]
    first = next((content for content in texts if content.strip()), "")
    return replace(conversation(name, pairs, group=first), line=where)


def _message(message: Any, number: int, where: str) -> tuple[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ROLES:
        raise UserError(f"{where}: message {number} has the role {role!r}; allowed: {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of message {number} is {type(content).__name__}, not text; {_ALLOWED}")
    return role, content
