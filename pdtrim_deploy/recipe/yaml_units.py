"""YAML units merged into one mapping, with the file that each key came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.paths import resolved


class Origins(dict[tuple[str, ...], Path]):
    """Key path -> the file that set it last."""

    def file_of(self, loc: tuple[str, ...]) -> Path:
        """The file of the longest known prefix of `loc`; `()` is the recipe itself."""
        return next(self[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self)


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice (YAML would silently keep the last), except one merged by `<<`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve `<<` once: afterwards the merged keys are among the node's own keys."""
        if node in self._merged:
            return
        self._merged.add(node)
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        super().flatten_mapping(node)
        keys = [self.construct_object(key, deep=True) for key in written]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", written[n].start_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Raise YAML's own kind of error for an invalid date or number, or a value that contradicts its tag.

        The same for a node that contains itself: YAML would build it, but no recipe could be read from it.
        """
        if node in self.recursive_objects:
            raise yaml.constructor.ConstructorError(None, None, "this anchor holds itself", node.start_mark)
        try:
            return super().construct_object(node, deep=True)
        except ValueError as error:
            problem = f"{node.value} is not a valid date or number ({error}); put it in quotes"
        except (LookupError, AttributeError):  # of a tag such as !!bool
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}; remove its tag"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def compose(path: Path, kind: str = "recipe") -> tuple[dict[str, Any], Origins]:
    """The file's includes in order, then its own keys, deep-merged, without `include`. Errors call it a `kind`.

    Raises:
        UserError: a file is missing or not YAML, an include is not a list of paths, or includes form a circle.

    """
    merged: dict[str, Any] = {}
    origins = Origins()
    _merge_file(merged, origins, path, (), kind)
    origins[()] = path
    return merged, origins


def _merge_file(merged: dict[str, Any], origins: Origins, path: Path, chain: tuple[Path, ...], kind: str) -> None:
    here = resolved(path)
    if here in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(here) :], here))
        raise UserError(f"{path}: include goes in a circle ({circle}); remove one of these includes")
    data = _read(path, kind)
    include = data.pop("include", [])
    if not isinstance(include, list) or not all(isinstance(item, str) for item in include):
        raise UserError(f"{path}: include is {include!r}; allowed: a list of paths relative to this file")
    for item in include:
        if not (path.parent / item).is_file():
            raise UserError(f"{path}: include names {item}, which is not a file; allowed: paths relative to this file")
        _merge_file(merged, origins, path.parent / item, (*chain, here), kind)
    _merge(merged, data, origins, path, ())


def _merge(into: dict[str, Any], data: dict[str, Any], origins: Origins, path: Path, at: tuple[str, ...]) -> None:
    for key, value in ((str(key), value) for key, value in data.items()):
        loc = (*at, key)
        origins[loc] = path
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, origins, path, loc)
        else:
            into[key] = value


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file; check the path") from None
    except IsADirectoryError:
        file = next((f", such as {file}" for file in sorted(path.glob("*.yaml"))), "")
        raise UserError(f"{path} is a folder; name a {kind} file{file}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a {kind} is YAML in UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a {kind} is a few keys deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: not valid YAML{place}: {problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {kind} is a mapping of keys to values, such as 'name: demo'")
    return data
