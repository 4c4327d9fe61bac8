"""What a part of the check is, and how its rows travel from the process that makes them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from pdtrim_deploy.gpucheck.row import Row

DEVICE_LOST = 75  # exit code of a part's process that cannot use its GPU any more, and has a row of what broke it
PLUGINS = Path(__file__).resolve().parents[2] / "plugins"  # of a clone
STATUSES = get_args(get_type_hints(Row)["status"])


@dataclass(frozen=True)
class Part:
    """One part, run in a process of its own.

    Attributes:
        name: of the command line, and of its rows where it makes none itself.
        function: `module:function`, which lists checks and skips with a reason what cannot be done. It takes nothing,
            or, where the part serves, SGLang's Python and a folder for what is built; nothing is built before a check.
        seconds: what it may take where the time is short; parts that follow leave it more.
        extra: whether other parts keep their time before it gets any.
        modules: what the Python that runs it must be able to import beside torch, which must see a CUDA device.
        serves: what SGLang's Python must be able to import; its torch must see the device then, not the part's own.

    """

    name: str
    function: str
    seconds: float
    modules: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    extra: bool = False


def line(row: Row) -> str:
    """A row as one line of JSON."""
    return json.dumps(asdict(row))


def parse(text: str) -> Row:
    """The row of a line.

    Raises:
        ValueError: it is none.

    """
    try:
        row = Row(**json.loads(text))
    except TypeError as error:
        raise ValueError(f"not a row: {error}") from None
    figure = row.figure
    if not isinstance(row.part, str) or row.status not in STATUSES or not isinstance(row.reason, str):
        raise ValueError("not a row: part, status or reason is of another kind")
    if figure is not None and not (
        isinstance(figure, dict) and all(isinstance(value, int | float | str) for value in figure.values())
    ):
        raise ValueError("not a row: its figure is no mapping to numbers and words")
    if odd := [name for name, value in (figure or {}).items() if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"not a row: {odd[0]} is {(figure or {})[odd[0]]}")
    return row


def parse_names(text: str) -> list[str]:
    """Names of a part's checks, from a line of JSON.

    Raises:
        ValueError: it is no list of them.

    """
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("no list of names")
    return names


def add_plugins() -> None:
    """In a clone that is not installed, the TensorRT plugin can be imported too; it is last, so another one wins."""
    if PLUGINS.is_dir() and str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
