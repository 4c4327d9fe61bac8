"""Data flows one way: no circle of imports between modules or packages, and nobody reaches where they must not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from imports import HOMES, circles, graph, imported, packages, siblings, sources

MODULES = sources()
GRAPH = graph(MODULES)
# room -> what no module of it may import, at the top or inside a function
FORBIDDEN = {
    "pdtrim_deploy.plan": ("torch", "transformers", "numpy"),
    "pdtrim_deploy.recipe": ("torch", "transformers"),
    "pdtrim_deploy.worker": ("torch", "transformers"),
    "pdtrim_deploy.kvcache": ("transformers", "pdtrim_deploy.models"),
    "pdtrim_sglang.sglang_host": ("pdtrim_sglang", "pdtrim_deploy"),  # the façade knows SGLang alone
}


def of(room: str) -> dict[str, Path]:
    return {name: path for name, path in MODULES.items() if name == room or name.startswith(f"{room}.")}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_no_packages_import_each_other_in_a_circle() -> None:
    assert circles(packages(GRAPH)) == []


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES} - {""}))
def test_what_lies_in_a_package_has_no_circle(package: str) -> None:
    assert circles(siblings(GRAPH, package)) == []


def test_the_root_of_the_core_holds_packages_and_errors() -> None:
    files = {path.name for path in (HOMES["pdtrim_deploy"] / "pdtrim_deploy").glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "errors.py"}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_clear_of(room: str) -> None:
    for module, path in of(room).items():
        for name in imported(path):
            for forbidden in FORBIDDEN[room]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{module} imports {name}"


def test_only_the_command_line_knows_plugins_and_builders() -> None:
    for module, others in GRAPH.items():
        if module.startswith("pdtrim_deploy.") and not module.startswith("pdtrim_deploy.cli"):
            assert not {other for other in others if not other.startswith("pdtrim_deploy")}, module


def test_nothing_but_the_entry_point_imports_the_patches() -> None:
    """They import everything else of the plugin, to hook it into SGLang."""
    for module, others in GRAPH.items():
        if module != "pdtrim_sglang" and not f"{module}.".startswith("pdtrim_sglang.patches."):
            assert not {other for other in others if f"{other}.".startswith("pdtrim_sglang.patches.")}, module


def test_a_circle_is_seen_through_a_function(tmp_path: Path) -> None:
    package = tmp_path / "tangled"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from tangled import b\n")
    (package / "b.py").write_text("def later():\n    from tangled.c import name\n")
    (package / "c.py").write_text("import tangled.a\nname = 1\n")
    (package / "d.py").write_text("from tangled.c import name\n")
    assert circles(graph(sources({"tangled": tmp_path}))) == [["tangled.a", "tangled.b", "tangled.c"]]


def test_a_circle_is_seen_between_a_package_and_its_neighbour(tmp_path: Path) -> None:
    """No module here imports itself in the end."""
    inner = tmp_path / "tangled" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("")
    (inner / "low.py").write_text("name = 1\n")
    (inner / "high.py").write_text("from tangled.beside import name\n")
    (inner.parent / "beside.py").write_text("from tangled.inner.low import name\n")
    modules = graph(sources({"tangled": tmp_path}))
    assert circles(modules) == []
    assert circles(siblings(modules, "tangled")) == [["tangled.beside", "tangled.inner"]]
    assert circles(siblings(modules, "tangled.inner")) == []
