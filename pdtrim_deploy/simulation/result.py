"""The result of a simulation: times of every request, and the figures of a load test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.loadtest.base import PERCENTILES, Percentiles
from pdtrim_deploy.loadtest.scenario import SLO


class Figures(BaseModel):
    """Figures of a simulation, named as in a load test.

    Attributes:
        goodput_requests_per_s: of requests within the SLO, None without one; `good_share` of all.
        prefill_busy, decode_busy, link_busy: shares of the time from the first arrival to the last token, which the
            workers of a stage and the links were in use, on average over them.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    simulated: bool = True
    requests: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    prefill_queue_ms: Percentiles
    goodput_requests_per_s: float | None
    good_share: float | None
    link_bytes: int
    prefill_busy: float
    decode_busy: float
    link_busy: float


@dataclass(frozen=True)
class Simulated:
    """Seconds on the simulation's clock, one array entry per request.

    Attributes:
        ready: in prefill's queue; begun: its first prefill batch; prefilled: its last one's end.
        landed: its KV has arrived at decode.
        first, done: first and last token.
        gaps: [runs, 2]: time between two tokens, and how many had it.

    """

    isl: np.ndarray
    osl: np.ndarray
    arrived: np.ndarray
    ready: np.ndarray
    begun: np.ndarray
    prefilled: np.ndarray
    landed: np.ndarray
    first: np.ndarray
    done: np.ndarray
    gaps: np.ndarray
    link_bytes: int
    link_busy_s: float
    prefill_busy_s: float
    decode_busy_s: float

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        return float(self.done.max() - self.arrived.min())

    def figures(self, slo: SLO | None = None) -> Figures:
        """Percentiles over all requests."""
        ttft, long = self.first - self.arrived, self.osl > 1
        itl = np.divide(self.done - self.first, self.osl - 1, where=long, out=np.zeros(len(self.osl)))
        wall, good = self.duration_s, None
        if slo is not None and slo != SLO():
            good = int(((ttft * 1e3 <= (slo.ttft_ms or np.inf)) & (itl * 1e3 <= (slo.itl_ms or np.inf))).sum())
        return Figures(
            requests=len(self.isl),
            duration_s=wall,
            requests_per_s=len(self.isl) / wall,
            output_tokens_per_s=int(self.osl.sum()) / wall,
            ttft_ms=Percentiles.of(ttft),
            itl_ms=self._gaps_ms(),
            tpot_ms=Percentiles.of(itl[long]),
            e2e_ms=Percentiles.of(self.done - self.arrived),
            prefill_queue_ms=Percentiles.of(self.begun - self.ready),
            goodput_requests_per_s=None if good is None else good / wall,
            good_share=None if good is None else good / len(self.isl),
            link_bytes=self.link_bytes,
            prefill_busy=self.prefill_busy_s / wall,
            decode_busy=self.decode_busy_s / wall,
            link_busy=self.link_busy_s / wall,
        )

    def _gaps_ms(self) -> Percentiles:
        """Quantiles over all gaps of all requests."""
        times, counts = self.gaps[np.argsort(self.gaps[:, 0])].T
        if not counts.sum():
            return Percentiles.of([])
        places = np.searchsorted(np.cumsum(counts), np.array(PERCENTILES) / 100 * counts.sum())
        values = times[np.minimum(places, len(times) - 1)] * 1e3
        return Percentiles(**{name: float(v) for name, v in zip(Percentiles.model_fields, values, strict=True)})
