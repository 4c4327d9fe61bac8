"""A Grafana dashboard of the KV transfer: panels and their PromQL. A test checks that each metric is exported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One graph: its queries by legend. `unit` is Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    help: str = ""


def _quantiles(histogram: str, by: str = "le") -> dict[str, str]:
    return {
        f"p{int(q * 100)}": f"histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket[$__rate_interval])))"
        for q in (0.5, 0.95, 0.99)
    }


def _mean(histogram: str) -> str:
    return f"sum(rate({histogram}_sum[$__rate_interval])) / sum(rate({histogram}_count[$__rate_interval]))"


PANELS: tuple[Panel, ...] = (
    Panel(
        "KV reduction against dense",
        "none",
        {
            "dense / wire": "sum(rate(pdtrim_kv_dense_bytes_sum[$__rate_interval])) / "
            "sum(rate(pdtrim_kv_wire_bytes_sum[$__rate_interval]))"
        },
        "What the unpruned model would have sent, over what was sent with headers and metadata rows.",
    ),
    Panel("KV sent", "Bps", {"wire": "sum(rate(pdtrim_kv_wire_bytes_sum[$__rate_interval]))"}),
    Panel(
        "KV bytes a request",
        "bytes",
        {"payload": _mean("pdtrim_kv_payload_bytes"), "dense": _mean("pdtrim_kv_dense_bytes")},
        "Each rank of a prefill worker counts what it sends: with several, these are a rank's bytes.",
    ),
    Panel("Transfer time", "s", _quantiles("pdtrim_kv_transfer_seconds")),
    Panel(
        "Transfers by outcome",
        "reqps",
        {"{{outcome}}": "sum by (outcome) (rate(pdtrim_kv_requests_total[$__rate_interval]))"},
        "Anything but success is worth an alert.",
    ),
    Panel("Prompt tokens a request", "none", _quantiles("pdtrim_kv_prompt_tokens")),
    Panel("Time to first token", "s", _quantiles("sglang:time_to_first_token_seconds")),
    Panel("Inter-token latency", "s", _quantiles("sglang:inter_token_latency_seconds")),
    Panel(
        "Tokens generated",
        "none",
        {"tokens/s": 'sum(rate(sglang:generation_tokens_total{engine_type="decode"}[$__rate_interval]))'},
        "By decode alone: a prefill worker counts the first token of each request once more.",
    ),
    Panel(
        "Requests in the workers",
        "none",
        {
            "running {{pod}}": "sglang:num_running_reqs",
            "queued {{pod}}": "sglang:num_queue_reqs",
            "waiting for KV {{pod}}": "sglang:num_decode_transfer_queue_reqs",
        },
    ),
    Panel("KV pool in use", "percentunit", {"{{pod}}": "sglang:token_usage"}),
    Panel("Router: requests", "reqps", {"requests": "sum(rate(smg_router_requests_total[$__rate_interval]))"}),
)


def names() -> list[str]:
    """Every metric that a query asks for."""
    text = " ".join(query for panel in PANELS for query in panel.queries.values())
    return sorted(set(re.findall(r"\b(?:pdtrim_|sglang:|smg_)\w+", text)))


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; its data source is chosen on import."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": "pdtrim-kv",
        "title": "pdtrim: KV between prefill and decode",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.help,
                "datasource": source,
                "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + n), "datasource": source, "expr": query, "legendFormat": legend}
                    for n, (legend, query) in enumerate(panel.queries.items())
                ],
            }
            for number, panel in enumerate(PANELS)
        ],
    }
