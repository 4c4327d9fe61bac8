"""Where a checkpoint comes from and under which licence, as far as its folder says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

# Carried along with the weights. Llama's use policy is a part of its licence.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_KEYS = ("license", "license_name", "license_link")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Provenance:
    """`licence` has the keys of a model card's front matter, `files` the licence texts, `hub_name` is ORG/NAME."""

    licence: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    hub_name: str | None = None

    @classmethod
    def read(cls, folder: Path, source: str) -> Provenance:
        """Of the checkpoint in `folder`, which the recipe names `source`."""
        files = sorted(path.name for path in folder.iterdir() if path.is_file() and is_licence(path.name))
        front = _front_matter(folder / "README.md")
        return cls({key: front[key] for key in _KEYS if front.get(key)}, tuple(files), _hub_name(folder, source))

    @property
    def name(self) -> str | None:
        """What the licence is called."""
        return self.licence.get("license_name") or self.licence.get("license")


def is_licence(name: str) -> bool:
    """Whether a file of that name is (part of) a licence."""
    return any(fnmatch(name, pattern) for pattern in LICENCE_FILES)


def _front_matter(readme: Path) -> dict[str, Any]:
    if not readme.is_file():
        return {}
    front = re.match(r"---\r?\n(.*?)\n---\s*\n", readme.read_text(errors="replace"), re.DOTALL)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):  # a bad date, tag, depth
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def _hub_name(folder: Path, source: str) -> str | None:
    """`hf:ORG/NAME` lies where a hub would have put it; else the name that transformers once wrote down."""
    kind, _, place = source.partition(":")
    name_or_path = json.loads((folder / "config.json").read_text()).get("_name_or_path")
    names = [place if kind == "hf" else "", name_or_path if isinstance(name_or_path, str) else ""]
    return next((name for name in names if _HUB_NAME.fullmatch(name)), None)
