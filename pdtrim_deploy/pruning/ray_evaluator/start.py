"""Ray for the time of a search: a cluster of this process's, or one that stands."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.errors import UserError

# Read by Ray when it is imported: all of its servers on the loopback interface, nothing reported to anyone.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
OBJECT_STORE = 256 << 20  # bytes: losses are small
ATTEMPTS = 3  # Ray gives a node 30 s to start, which a busy machine may not make


def check_installed() -> None:
    """UserError without Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--workers needs Ray; install it with: pip install 'pdtrim-deploy[ray]'")


@dataclass(frozen=True)
class Workers:
    """How many, with how many GPUs each, in the cluster at `address` (HOST:PORT of its head) or on this machine."""

    count: int
    address: str | None = None
    gpus: float = 0.0


@contextmanager
def cluster(workers: Workers) -> Iterator[None]:
    """Ray for the time of a search: one of our own on 127.0.0.1 that ends with it, or the one at `workers.address`.

    Raises:
        UserError: nothing answers at the address, or Ray does not start.

    """
    if workers.address is None:
        if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in LOCAL.items()):
            raise RuntimeError("ray was imported before: its servers would listen on all interfaces")
        os.environ.update(LOCAL)
    import ray

    options: dict[str, Any] = {"address": workers.address}
    if workers.address is None:
        options = {"address": "local", "num_cpus": workers.count, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE, "_node_ip_address": "127.0.0.1"}
    _start(ray, options)
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, more: dict[str, Any]) -> None:
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(**more, log_to_driver=False, configure_logging=False)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {more['address']}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # what Ray raises when a node does not start in time
            ray.shutdown()
            if not left:
                raise UserError(f"Ray does not start here: {str(error).splitlines()[0]}") from None
