"""A server's Prometheus metrics as typed values."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from pdtrim_deploy.serving.client import get


@dataclass(frozen=True)
class Sample:
    """One value; a histogram has samples NAME_bucket (label `le`), NAME_sum and NAME_count."""

    labels: dict[str, str]
    value: float


def parse(text: str) -> dict[str, list[Sample]]:
    """Samples by full name (`NAME_bucket`, `NAME_total`, ...), from the text exposition format."""
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(Sample(dict(sample.labels), sample.value))
    return samples


def scrape(url: str, timeout_s: float = 10.0) -> dict[str, list[Sample]]:
    """The current samples of `url` (ending in /metrics); OSError when it does not answer."""
    return parse(get(url, timeout_s))


def total(samples: dict[str, list[Sample]], name: str, **labels: str) -> float:
    """The sum over all samples of `name` that carry `labels`; 0 when there are none."""
    return sum(s.value for s in samples.get(name, []) if labels.items() <= s.labels.items())
