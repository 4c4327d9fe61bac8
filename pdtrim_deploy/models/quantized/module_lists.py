"""Lists of modules in a quantisation's settings, for a stage: its blocks have other numbers than the source's.

An entry is a name (`model.layers.4.mlp.gate`), a pattern with `*` (modelopt) or `re:` and a regular expression
(compressed-tensors). A name of a block is renumbered, or left out with its block. A pattern that means the same modules
in the stage is kept; any other is replaced by the names of the modules that it matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pdtrim_deploy.errors import UserError

_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "targets")
_OF_KV = ("kv_cache_scheme", "kv_cache_quant_algo")
_EXPERT = re.compile(r"\.experts\.\d+(?=\.|$)")
_IN_BLOCK = re.compile(r"(?P<before>(?:.*\.)?layers\.)(?P<block>\d+)(?P<inner>(?:\..*)?)")


def cut_settings(settings: Any, blocks: Sequence[int], tensors: Iterable[str]) -> Any:
    """`settings` of a stage that runs `blocks` of a model with those `tensors`; nothing of KV pools is left in it.

    Raises:
        UserError: a pattern is no regular expression.

    """
    modules = sorted({parent for name in tensors for parent in _parents(name)})
    return _cut(settings, {block: index for index, block in enumerate(blocks)}, modules)


def tells_experts_apart(settings: Any, tensors: Iterable[str]) -> bool:
    """Whether an entry of a list names an expert, or is a pattern of some of a block's; UserError as `cut_settings`."""
    alike: dict[str, list[str]] = {}
    for module in {parent for name in tensors for parent in _parents(name)}:
        alike.setdefault(_EXPERT.sub(".experts.*", module), []).append(module)
    groups = [modules for modules in alike.values() if len(modules) > 1]
    return any(
        any(len({_matches(entry, module) for module in group}) > 1 for group in groups)
        if _is_pattern(entry)
        else _EXPERT.search(entry)
        for entry in _listed(settings)
    )


def _cut(settings: Any, place: dict[int, int], modules: Sequence[str]) -> Any:
    if isinstance(settings, list):
        return [_cut(value, place, modules) for value in settings]
    if not isinstance(settings, dict):
        return settings
    cut: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _OF_KV:
            cut[key] = None
        elif key in _LISTS and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            cut[key] = list(dict.fromkeys(new for entry in value for new in _entries(entry, place, modules)))
        else:
            cut[key] = _cut(value, place, modules)
    return cut


def _listed(settings: Any) -> Iterator[str]:
    """Entries of all lists."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key in _LISTS and isinstance(value, list):
            yield from (entry for entry in value if isinstance(entry, str))
        else:
            yield from _listed(value)


def _entries(entry: str, place: dict[int, int], modules: Sequence[str]) -> Iterator[str]:
    if not _is_pattern(entry):
        if (name := _renumbered(entry, place)) is not None:
            yield name
        return
    kept = [(module, name) for module in modules if (name := _renumbered(module, place)) is not None]
    if all(_matches(entry, module) == _matches(entry, name) for module, name in kept):
        yield entry
        return
    yield from (name for module, name in kept if _matches(entry, module))


def _parents(tensor: str) -> Iterator[str]:
    """The module of a tensor and those that it lies in."""
    parts = tensor.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))


def _renumbered(name: str, place: dict[int, int]) -> str | None:
    """The name in the stage; None: its block is gone."""
    if (match := _IN_BLOCK.fullmatch(name)) is None:
        return name
    index = place.get(int(match["block"]))
    return None if index is None else f"{match['before']}{index}{match['inner']}"


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or "*" in entry


def _matches(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return fnmatchcase(module, entry)
    pattern = entry.removeprefix("re:")
    try:
        return re.match(pattern, module) is not None
    except (re.error, OverflowError) as error:
        sentence = f"quantization_config: pattern {pattern!r} is no regular expression ({error}); mend it"
        raise UserError(sentence) from None
