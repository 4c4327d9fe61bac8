"""Requirements of a KV transport: its library, and the user's consent if it accepts unauthenticated writes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.environment import ServeEnvironment


@dataclass(frozen=True)
class Library:
    """A Python package in the serve environment; `open`: it lets other programs write even on loopback."""

    module: str
    package: str
    open: bool = False


@dataclass(frozen=True)
class Transport:
    """SGLang's name of a KV transfer backend, and its options."""

    backend: str = "pdtrim_tcp"
    options: Mapping[str, Any] = field(default_factory=dict)


LIBRARIES = {
    "pdtrim_nixl": Library("nixl", "nixl==1.5.1 nixl-cu13==1.5.1"),
    "pdtrim_mooncake": Library("mooncake", "mooncake-transfer-engine-non-cuda==0.3.13.post1", open=True),
}


def require_transport(
    environment: ServeEnvironment, backend: str, options: Mapping[str, Any], device: str = "cuda"
) -> None:
    """UserError when workers of `environment` on `device` could not start with this transport."""
    if options.get("slots") == "device" and (device == "cpu" or backend not in LIBRARIES):
        raise UserError(
            f"--transport-option slots=device needs workers on GPUs and --transport {' or '.join(LIBRARIES)}, not "
            f"{backend} on {device}; use slots=host, or leave it out"
        )
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
