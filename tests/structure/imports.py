"""The import graph of our packages, read from the sources: imports inside functions and under TYPE_CHECKING count."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOMES = {
    "pdtrim_deploy": ROOT,
    "pdtrim_builders": ROOT / "builders",
    "pdtrim_sglang": ROOT / "plugins",
    "pdtrim_tensorrt": ROOT / "plugins",
}
Graph = dict[str, set[str]]


def sources(homes: Mapping[str, Path] = HOMES) -> dict[str, Path]:
    """Every module of our packages by its dotted name, a package's `__init__` by the package's."""
    modules = {}
    for package, home in homes.items():
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives `a.b`, which may be a module or a name in one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(modules: Mapping[str, Path]) -> Graph:
    """Which of our modules each of them imports."""

    def ours(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {module: {ours(name) for name in imported(path)} - {"", module} for module, path in modules.items()}


def packages(modules: Graph) -> Graph:
    """The same between rooms: the packages right below `pdtrim_deploy`, and each other package as a whole."""

    def room(module: str) -> str:
        top, *rest = module.split(".")
        return f"{top}.{rest[0]}" if top == "pdtrim_deploy" and rest else top

    rooms: Graph = {}
    for module, others in modules.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in rooms.items()}


def siblings(modules: Graph, package: str) -> Graph:
    """The same between modules and packages right below `package`; what lies in one of them counts as that."""

    def child(module: str) -> str:
        return ".".join(module.split(".")[: package.count(".") + 2])

    rooms: Graph = {}
    for module, others in modules.items():
        if module.startswith(f"{package}."):
            inside = {child(other) for other in others if other.startswith(f"{package}.")}
            rooms.setdefault(child(module), set()).update(inside - {child(module)})
    return rooms


def circles(edges: Graph) -> list[list[str]]:
    """Groups of nodes that can reach each other, by names that reach each of them."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        reached, waiting = set[str](), [start]
        while waiting:
            for other in edges[waiting.pop()] - reached:
                reached.add(other)
                waiting.append(other)
        reach[start] = reached
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in edges if a in reach[a]}
    return [list(group) for group in sorted(groups)]
