"""A worker's plan: read once, and again when its file has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.plan_source import read_plan
from tinypd import make_plan


def test_a_plan_is_parsed_once_for_a_file(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for removed in ((2,), (2, 3)):
        plan = make_plan((2,), removed)
        config.write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
        os.utime(config, ns=(len(removed), len(removed)))
        first = read_plan(str(tmp_path))
        assert first == plan
        assert read_plan(str(tmp_path)) is first


def test_a_folder_without_a_plan_has_none(tmp_path: Path) -> None:
    assert read_plan(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert read_plan(str(tmp_path)) is None
