"""Each message in docs/troubleshooting.md exists in the code, or in the results of the fault benchmark."""

from __future__ import annotations

import ast
import re

import pytest
from shown import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OF_SGLANG = "These come from SGLang or its router:"
GAP = "\0"  # what differs from time to time, as `...` on the page


def _texts() -> str:
    """Every string of our code, f-strings with GAP in the place of values."""
    texts = []
    for folder in ("pdtrim_deploy", "plugins", "builders"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    values = (str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
                    texts.append("".join(values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


OURS = _texts()
SEEN = (ROOT / "benchmarks" / "results" / "faults.json").read_text()


def _messages(part: str) -> list[str]:
    """First cells of the part's tables."""
    return re.findall(r"^\| `(.+?)` \|", part, re.MULTILINE)


def absent(message: str, texts: str) -> list[str]:
    """Pieces of a message, between its gaps, that no text contains."""
    pieces = [piece.strip(" ():;,") for piece in message.split("...")]
    return [piece for piece in pieces if len(piece) > 5 and piece not in texts]


@pytest.mark.parametrize("message", _messages(PAGE.partition(OF_SGLANG)[0]))
def test_a_message_of_ours_is_said_by_the_code(message: str) -> None:
    assert absent(message, OURS) == []


@pytest.mark.parametrize("message", _messages(PAGE.partition(OF_SGLANG)[2]))
def test_a_message_of_others_was_seen(message: str) -> None:
    assert absent(message, SEEN) == []


def test_both_kinds_are_there() -> None:
    assert len(_messages(PAGE.partition(OF_SGLANG)[0])) > 25
    assert len(_messages(PAGE.partition(OF_SGLANG)[2])) >= 5
    assert absent("plans differ: prefill serves plan ..., decode is tired", OURS) == ["decode is tired"]
