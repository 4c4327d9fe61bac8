"""What tests of builds read."""

from pathlib import Path

import pytest
from tinytext import write_words


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of random words. Read them, do not write to them."""
    return write_words(tmp_path_factory.mktemp("text"))
