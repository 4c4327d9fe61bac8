"""What is proved of each family of models: from families.json, which the tests' own run writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.base import table, where

COLUMNS = ("plan", "kv", "prune", "experts", "heal", "reload", "served", "engine")


def families(data: Mapping[str, Any]) -> str:
    """A row a family; an empty cell: no test of it has passed, or there is none."""
    rows = [(name, *(results.get(column, "") for column in COLUMNS)) for name, results in data["rows"].items()]
    return table(("family", *COLUMNS), rows) + where(data["environment"], "tiny random models in float32", model="")
