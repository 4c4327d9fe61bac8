"""Load against a served pair: drivers by name, one typed result."""

from __future__ import annotations

import importlib
import ipaddress
from types import ModuleType
from urllib.parse import urlsplit

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.base import Driver, LoadResult, LoadRun, Outcome
from pdtrim_deploy.loadtest.scenario import Scenario
from pdtrim_deploy.loadtest.workers import WorkerFigures, Workers

# Name -> module with functions `drive` (the driver) and `check` (refuses unsupported scenarios); imported on use.
DRIVERS = {"builtin": "pdtrim_deploy.loadtest.builtin", "aiperf": "pdtrim_deploy.loadtest.aiperf"}

__all__ = [
    "DRIVERS",
    "Driver",
    "LoadResult",
    "LoadRun",
    "Outcome",
    "Scenario",
    "WorkerFigures",
    "Workers",
    "check_scenario",
    "check_target",
    "driver",
]


def driver(name: str) -> Driver:
    """The driver called `name`; UserError lists the valid names."""
    return _module(name).drive


def check_scenario(name: str, scenario: Scenario) -> None:
    """UserError when the driver called `name` does not support the scenario."""
    _module(name).check(scenario)


def check_target(url: str, allow_remote: bool) -> None:
    """Refuse anything but http(s) URLs, and other machines unless `allow_remote`."""
    host = _host(url)
    if host is None:
        shown = url if url.isprintable() else repr(url)
        raise UserError(f"{shown} is not a URL such as http://127.0.0.1:8000")
    if not allow_remote and not _loopback(host):
        raise UserError(f"{host} is another machine; give --allow-remote if you may put load on it")


def _module(name: str) -> ModuleType:
    if name not in DRIVERS:
        raise UserError(f"load driver {name!r} is not known; allowed: {', '.join(sorted(DRIVERS))}")
    return importlib.import_module(DRIVERS[name])


def _host(url: str) -> str | None:
    if not url.isprintable() or " " in url:  # urlsplit drops some of these
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError: no number of a port
    except ValueError:
        return None
    return parts.hostname if parts.scheme in ("http", "https") else None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
