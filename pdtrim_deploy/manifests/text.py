"""Manifests as YAML for kubectl and Docker, which read it by other rules than PyYAML writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

# By YAML 1.1 such words are none of these, and PyYAML writes them without quotes; Go's readers take them for such.
_NUMBER = re.compile(r"[-+]?((\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+)$")
_TRUTH = re.compile(r"[yYnN]$")


class _Dumper(yaml.SafeDumper):
    """Also quotes words that are numbers or truth values for others alone, such as 1e-5."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", _TRUTH, list("yYnN"))


def yaml_text(documents: Sequence[Any]) -> str:
    """One file of all documents."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
    return text
