"""What a KV transport needs before workers are started with it: its library, and the user's word where it is open."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.environment import ServeEnvironment


@dataclass(frozen=True)
class Library:
    """A Python package beside SGLang; `open` says that it lets strangers write even on loopback."""

    module: str
    package: str
    open: bool = False


@dataclass(frozen=True)
class Transport:
    """SGLang's name of a KV transfer backend, and what it is told."""

    backend: str = "pdtrim_tcp"
    options: Mapping[str, Any] = field(default_factory=dict)


LIBRARIES = {
    "pdtrim_nixl": Library("nixl_cu12", "nixl-cu12==1.5.1"),
    "pdtrim_mooncake": Library("mooncake", "mooncake-transfer-engine-non-cuda==0.3.13.post1", open=True),
}


def require_transport(environment: ServeEnvironment, backend: str, options: Mapping[str, Any]) -> None:
    """UserError when workers of `environment` could not start with this transport."""
    library = LIBRARIES.get(backend)
    if library is None:
        return
    if library.open and not options.get("accept_unauthenticated"):
        raise UserError(
            f"--transport {backend} listens on every network device without authentication, so whoever reaches this "
            "machine can write into the workers' memory; on a network of its own say so: "
            "--transport-option accept_unauthenticated=true, or use --transport pdtrim_tcp"
        )
    probe = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({library.module!r}) is None)"
    if subprocess.run([environment.python, "-c", probe], check=False, capture_output=True).returncode:
        raise UserError(
            f"--transport {backend} needs the Python package {library.package}, which is not installed; install "
            f"it: {environment.python} -m pip install --no-deps {library.package}, or use --transport pdtrim_tcp"
        )
