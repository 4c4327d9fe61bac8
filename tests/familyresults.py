"""What tests of families prove, written down by the run itself: `pytest --family-results FILE`.

A test says with `record_property("family", (architecture, column, result))` what it proves if it passes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


class FamilyResults:
    """Of one run; rows of another run in the same file stay."""

    def __init__(self, file: Path) -> None:
        self._file, self._rows = file, dict[str, dict[str, str]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A property of a test that passed is a row's cell."""
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "family":
                    architecture, column, result = value
                    self._rows.setdefault(architecture, {})[column] = result

    def pytest_sessionfinish(self) -> None:
        """Merge with what is there."""
        before = json.loads(self._file.read_text()) if self._file.exists() else {}
        names = sorted({*before, *self._rows})
        merged = {name: before.get(name, {}) | self._rows.get(name, {}) for name in names}
        self._file.write_text(json.dumps(merged, indent=2) + "\n")
