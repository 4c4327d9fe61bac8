"""Requests to simulate: when they arrive and how long they are, without text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdtrim_deploy.loadtest.scenario import Lengths
from pdtrim_deploy.loadtest.schedule import Job


@dataclass(frozen=True)
class Load:
    """One array an attribute, in the order of arrival.

    Attributes:
        due: seconds after the start, ascending; None in a closed loop of `clients`, each sending its next request when
            its last one is done.
        isl, osl: prompt and answer tokens, int64, at least 1.

    """

    due: np.ndarray | None
    isl: np.ndarray
    osl: np.ndarray
    clients: int | None = None

    @classmethod
    def poisson(cls, rate: float, requests: int, isl: Lengths, osl: Lengths, seed: int = 0) -> Load:
        """`requests` Poisson arrivals at `rate`/s."""
        rng = np.random.default_rng(seed)
        return cls(np.cumsum(rng.exponential(1 / rate, requests)), draws(isl, requests, rng), draws(osl, requests, rng))

    @classmethod
    def of(cls, jobs: Sequence[Job], prompt_tokens: Sequence[int] | None = None, clients: int | None = None) -> Load:
        """The requests of a load test; `prompt_tokens` as the server counted them, else as many as words."""
        lengths = prompt_tokens or [len(job.prompt.split()) for job in jobs]
        due = None if clients else np.array([job.due_s or 0.0 for job in jobs])
        return cls(due, np.array(lengths), np.array([job.output_tokens for job in jobs]), clients)


def draws(lengths: Lengths, count: int, rng: np.random.Generator) -> np.ndarray:
    """As loadtest's `tokens`, many at once."""
    match lengths.kind:
        case "fixed":
            return np.full(count, lengths.tokens or 1)
        case "uniform":
            return rng.integers(lengths.low or 1, (lengths.high or 1) + 1, count)
        case "normal":
            values = rng.normal(lengths.tokens or 1, lengths.spread or 0, count)
        case "lognormal":
            values = (lengths.tokens or 1) * np.exp(rng.normal(0, lengths.spread or 0, count))
    return np.clip(np.rint(values), lengths.low or 1, lengths.high or np.inf).astype(np.int64)
