"""What this environment's SGLang is, and whether everything that the plugin takes from it is there, as JSON on stdout.

    python -m pdtrim_sglang.diagnosis            # reads SGLang's sources: a second, nothing is imported
    python -m pdtrim_sglang.diagnosis --deep     # loads the plugin into SGLang as a worker would: up to a minute
    python -m pdtrim_sglang.diagnosis --check    # one sentence and exit code 1 when the plugin does not fit

`pdtrim-deploy doctor` starts it in the serve environment.
"""

from __future__ import annotations

import ast
import ctypes.util
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pdtrim_sglang import hook_targets
from pdtrim_sglang.attention.factory import ATTENTION

PACKAGES = ("sglang", "sglang-router", "torch", "transformers", "onnxruntime", "onnxruntime-extensions", "tensorrt")
OURS = Path(__file__).parent
# Python package and shared libraries that a transport needs.
MODULES = {"nixl": "nixl", "mooncake": "mooncake"}
LIBRARIES = {"tcp": (), "nixl": (), "mooncake": ("ibverbs", "rdmacm", "numa")}


def diagnose(deep: bool = False) -> dict[str, Any]:
    """Versions, hook targets, imported names, transports; `deep` adds the error of really loading the plugin."""
    spec = importlib.util.find_spec("sglang")
    root = (
        Path(next(iter(spec.submodule_search_locations))).parent if spec and spec.submodule_search_locations else None
    )
    entry_points = metadata.entry_points(group="sglang.srt.plugins")
    report = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": _kernels(),
        "plugin": any(point.value == "pdtrim_sglang:register" for point in entry_points),
        "read_against": hook_targets.READ_AGAINST,
        "targets": {target: bool(root and stands(root, target)) for target in hook_targets.TARGETS},
        "imports": {name: bool(root and stands(root, name)) for name in sorted(imported())},
        "sparse_backends": list(ATTENTION),
        "transports": {name: _missing_libraries(name) for name in transports()},
    }
    return report | ({"deep": _load()} if deep else {})


def imported() -> set[str]:
    """`module.name` of everything that the plugin's files import from sglang."""
    return {
        f"{node.module}.{alias.name}"
        for file in OURS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang"
        for alias in node.names
    }


def stands(root: Path, target: str) -> bool:
    """Whether `package.module.name` or `package.module.Class.method` is in the sources below `root`."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = root.joinpath(*parts[:cut])
        file = next((f for f in (module.with_suffix(".py"), module / "__init__.py") if f.is_file()), None)
        if file is not None:
            return _names(_parsed(file), parts[cut:])
    return False


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _names(scope: ast.AST, path: list[str]) -> bool:
    if not path:
        return True
    for node, name in _bound(scope):
        if name == path[0]:
            return _names(node, path[1:]) if isinstance(node, ast.ClassDef) else len(path) == 1
    return False


def _bound(scope: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Names bound directly in a module or class, also under `if` and `try`."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield node, alias.asname or alias.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield node, target.id
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _bound(node)


def transports() -> list[str]:
    """Names in the transports' registry, read and not imported: that would import torch."""
    for node in ast.parse((OURS / "transports" / "__init__.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TRANSPORTS":
            assert isinstance(node.value, ast.Dict)
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise AssertionError("transports/__init__.py has no TRANSPORTS")


def _missing_libraries(transport: str) -> list[str]:
    module = MODULES.get(transport)
    package = [module] if module and importlib.util.find_spec(module) is None else []
    return package + [f"lib{name}" for name in LIBRARIES.get(transport, ()) if ctypes.util.find_library(name) is None]


def _kernels() -> str | None:
    """`package`, `stub` (tools/cpu_stubs, for CPUs) or None."""
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None or spec.origin is None:
        return None
    return "stub" if "cpu_stubs" in Path(spec.origin).parts else "package"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _load() -> str | None:
    """Load the plugin as a worker does; what went wrong, or None."""
    try:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        hook_targets.check()
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return None


def misfit(report: dict[str, Any]) -> str | None:
    """What keeps the plugin from running in this SGLang, or None."""
    gone = [name for kind in ("targets", "imports") for name, stands in report[kind].items() if not stands]
    version, supported = report["packages"]["sglang"], report["read_against"]
    if version != supported:
        return f"SGLang is {version or 'not installed'}; this plugin was written for SGLang {supported}"
    if gone:
        return f"SGLang {version} has no {', '.join(gone)}"
    return None if report["plugin"] else "the plugin's entry point is not installed"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(misfit(diagnose()))
    print(json.dumps(diagnose("--deep" in sys.argv[1:])))
