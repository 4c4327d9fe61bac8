"""A corpus of random words, for `dir:`."""

import random
from pathlib import Path

from pdtrim_deploy.loadtest.text import WORDS


def write_words(folder: Path, files: int = 12, words: int = 400) -> Path:
    """`0.txt`, `1.txt` ... in the new `folder`, of that many words each; the same every time."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(WORDS, k=words)))
    return folder
