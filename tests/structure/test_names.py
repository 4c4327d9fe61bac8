"""Names say what a thing is: `request`, `result`, `config`, not `asked` or `found`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VAGUE = {"one", "found", "asked", "said", "made", "wanted", "told", "around", "behind", "elsewhere", "arrival"}
VAGUE |= {"given", "own", "mine", "theirs", "way"}
FOLDERS = ("pdtrim_deploy", "builders", "plugins", "tools", "benchmarks", "tests")


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Variables, parameters, attributes, functions, classes and keyword arguments, with their lines."""
    property_tests = {id(node) for decorator in ast.walk(tree) for node in _of_hypothesis(decorator)}
    for node in ast.walk(tree):
        if id(node) in property_tests:
            continue
        line = getattr(node, "lineno", 0)
        match node:
            case ast.FunctionDef(name=str(name)) | ast.AsyncFunctionDef(name=str(name)) | ast.ClassDef(name=str(name)):
                yield name, line
            case ast.Attribute(value=ast.Name(id="HookType")):
                continue  # SGLang's names
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name, line
            case ast.keyword(arg=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name, line
            case ast.alias(name=name, asname=asname):
                yield asname or name, line
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield name, line


def _of_hypothesis(node: ast.AST) -> Iterator[ast.AST]:
    """What names its decorator `given`: the import, and the decorators of a function."""
    match node:
        case ast.ImportFrom(module="hypothesis"):
            yield from node.names
        case ast.FunctionDef():
            yield from (decorator.func for decorator in node.decorator_list if isinstance(decorator, ast.Call))


def vague(source: str) -> dict[str, int]:
    """The vague names of a module, each with a line where it stands."""
    return {name: line for name, line in names(ast.parse(source)) if name.lstrip("_").lower() in VAGUE}


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_say_what_things_are(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        bad = vague(path.read_text())
        assert not bad, f"{path.relative_to(ROOT)}: {bad}; name the thing: request, result, response, config, layer"


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "def read(asked): ...",
        "def _told(): ...",
        "class Asked: ...",
        "result.asked",
        "call(said=1)",
        "from a import b as said",
        "[0 for one in ()]",
        "def read(**given): ...",
        "@given(1)\ndef read(own): ...",
        "lambda mine: 0",
        "f'{made}'",
        "try: ...\nexcept OSError as behind: ...",
        "match x:\n    case [*around]: ...",
    ],
)
def test_a_vague_name_is_seen(source: str) -> None:
    assert vague(source)


def test_words_within_names_keys_and_text_are_free() -> None:
    assert not vague("kept_rows = {'found': 'one'}  # said")
    assert not vague("HookType.AROUND")
    assert not vague("from hypothesis import given\n@given(1)\ndef test(): ...")
