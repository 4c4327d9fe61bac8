"""Every metric that the Grafana dashboard asks for is exported: by the plugin, by SGLang, or by the router."""

import re
from pathlib import Path

import pytest

from pdtrim_deploy.manifests import dashboard

pytest.importorskip("sglang", reason="needs the serve environment")

KINDS = {"Histogram": ("_bucket", "_sum", "_count"), "Counter": ("",), "Gauge": ("",)}


def of_the_plugin() -> set[str]:
    from types import SimpleNamespace

    from pdtrim_sglang.metrics import TransferMetrics
    from prometheus_client import REGISTRY, generate_latest

    metrics = TransferMetrics()
    progress = SimpleNamespace(
        payload_bytes=1,
        staged_bytes=0,
        wire_bytes=2,
        prompt_tokens=3,
        seconds=0.1,
        reused_tokens=1,
        draft_bytes=0,
        state_bytes=0,
        early_bytes=0,
    )
    metrics.succeeded(progress, 4, 1)
    return set(re.findall(r"^(pdtrim_\w+)", generate_latest(REGISTRY).decode(), re.MULTILINE))


def of_sglang() -> set[str]:
    import sglang

    source = (Path(sglang.__path__[0]) / "srt" / "observability" / "metrics_collector.py").read_text()
    names = set()
    for kind, name in re.findall(r"\b(Histogram|Counter|Gauge)\(\s*name=\"(sglang:\w+)\"", source):
        names |= {name + end for end in KINDS[kind]}
    return names


def test_every_name_is_exported():
    import sglang_router

    (library,) = Path(sglang_router.__path__[0]).glob("*.so")
    known, compiled = of_the_plugin() | of_sglang(), library.read_bytes()
    names = set(dashboard.names())
    assert {name.partition("_")[0].partition(":")[0] for name in names} == {"pdtrim", "sglang", "smg"}
    unknown = {n for n in names if n not in known and not (n.startswith("smg_") and n.encode() in compiled)}
    assert unknown == set()
