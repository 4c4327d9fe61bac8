"""On PYTHONPATH: this Python, and all that it starts, find no package but torch, triton and what these need."""

import os
import re
import sys
from importlib import metadata
from importlib.machinery import PathFinder


def needed(names):
    """Distributions by name, and what they require."""
    reached = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in reached:
            continue
        reached.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        names += [re.match(r"[\w.-]+", text)[0] for text in requirements if "extra ==" not in text]
    return reached


def hidden():
    """Top-level modules of all other distributions, but for our own."""
    kept = needed(["torch", "triton", *(["numpy"] if os.environ.get("TRITON_INTERPRET") else [])])  # the interpreter's
    providers = metadata.packages_distributions().items()
    normal = {
        module: {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} for module, distributions in providers
    }
    return {module for module, names in normal.items() if not names & kept and not module.startswith(("pdtrim_", "__"))}


HIDDEN = hidden()
found_by_path = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else found_by_path(name, path, target)


PathFinder.find_spec = staticmethod(find_spec)
assert "pydantic" in HIDDEN
assert not {"torch", "triton", "sympy"} & HIDDEN
assert "pydantic" not in sys.modules
