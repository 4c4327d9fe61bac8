"""How fast one worker of each stage is: given in a file, or read from load tests of a served pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.base import LoadResult
from pdtrim_deploy.recipe.yaml_errors import sentence
from pdtrim_deploy.recipe.yaml_units import Origins, compose

ALONE = 1.2  # requests in the system, by Little's law, up to which a load counts as one request at a time

_Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


class Limits(BaseModel):
    """What a pair was told and no load test shows; see Rates."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    chunk_tokens: _Count = 8192
    max_running: Annotated[int, Field(ge=1, le=65_536)] = 256
    pool_tokens: _Count | None = None

    @classmethod
    def _parse(cls, data: dict[str, Any], origins: Origins) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            if error.errors()[0]["loc"][0] == "decode_step_ms":
                where = origins.file_of(("decode_step_ms",))
                form = "requests in a batch and the milliseconds of a step, such as {1: 9.5, 16: 11}"
                raise UserError(f"{where}: decode_step_ms is {data.get('decode_step_ms')!r}; allowed: {form}") from None
            raise UserError(sentence(cls, error, origins)) from None


class Rates(Limits):
    """One prefill and one decode worker.

    Attributes:
        prefill_tokens_per_s, prefill_base_ms: a batch of n prompt tokens takes base + n / rate.
        decode_step_ms: requests in a decode batch -> time of a step; between them linear, beyond by the last slope.
        overhead_ms: what TTFT has besides prefill and transfer, without load: router, tokenizer, hand-shake.
        transfer_ms: what a transfer takes besides bytes over the link.
        chunk_tokens: prompt tokens that one prefill batch may hold (SGLang's --chunked-prefill-size).
        max_running: requests that a decode batch may hold (--max-running-requests).
        pool_tokens: KV rows of a decode worker's pool (--max-total-tokens); no limit without it.
        doubts: why these may not be the workers' own, a sentence each.

    """

    prefill_tokens_per_s: PositiveFloat
    prefill_base_ms: NonNegativeFloat = 0.0
    decode_step_ms: Annotated[dict[_Count, PositiveFloat], Field(min_length=1)]
    overhead_ms: NonNegativeFloat = 0.0
    transfer_ms: NonNegativeFloat = 0.0
    doubts: tuple[str, ...] = ()

    def alone_s(self, tokens: int) -> float:
        """Of one request in as many chunks as it needs."""
        return -(-tokens // self.chunk_tokens) * self.prefill_base_ms / 1e3 + tokens / self.prefill_tokens_per_s

    def steps_s(self) -> list[float]:
        """Seconds of a decode step at 0, 1, ... `max_running` requests."""
        known = sorted(self.decode_step_ms.items())
        batches, times = np.array(known, dtype=float).T
        sizes = np.arange(self.max_running + 1)
        steps = np.interp(sizes, batches, times)
        if len(known) > 1:
            slope = (times[-1] - times[-2]) / (batches[-1] - batches[-2])
            steps += np.maximum(0.0, sizes - batches[-1]) * max(0.0, slope)
        return (steps / 1e3).tolist()

    def scaled(self, prefill: float, decode: float) -> Rates:
        """Of a model with these shares of the blocks: all that grows with tokens and steps, by its share."""
        return self.model_copy(
            update={
                "prefill_tokens_per_s": self.prefill_tokens_per_s / prefill,
                "decode_step_ms": {batch: ms * decode for batch, ms in self.decode_step_ms.items()},
            }
        )

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Rates:
        """One file of rates (YAML or JSON), or results of `loadtest --json`, one of them of a request at a time.

        With results may come one file of limits (chunk_tokens, max_running, pool_tokens).

        Raises:
            UserError: a file that is neither, both kinds together, or results that do not tell every rate.

        """
        read = {str(path): compose(path, "rates") for path in paths}
        results = [(name, _result(name, data)) for name, (data, _) in read.items() if "ttft_ms" in data]
        other = [(name, data, origins) for name, (data, origins) in read.items() if "ttft_ms" not in data]
        if not results and len(other) == 1:
            return cls._parse(*other[0][1:])
        if len(other) > 1 or any(not data.keys() <= Limits.model_fields.keys() for _, data, _ in other):
            raise UserError(
                f"{other[0][0]} is no result of loadtest --json; give one file of rates, or only such results and at "
                f"most one file of {', '.join(Limits.model_fields)}"
            )
        more = Limits._parse(*other[0][1:]).model_dump() if other else {}
        return cls.measured(results, **more)

    @classmethod
    def measured(cls, results: Sequence[tuple[str, LoadResult]], **more: Any) -> Rates:
        """From load tests of one prefill and one decode worker, named for errors.

        Prefill and what it costs besides come from loads of one request at a time, with two lengths both rate and base.
        `more` are other fields.

        Raises:
            UserError: a result with failures or without figures of the workers, or none of one request at a time.

        """
        for name, result in results:
            if result.failed:
                failures = f"{result.failed} of {result.requests} requests failed"
                raise UserError(f"{name}: {failures}, which tells no rates; measure it again")
        alone = [(name, result) for name, result in results if in_system(result) <= ALONE]
        if not alone:
            raise UserError(
                f"{results[0][0]}: no result is of one request at a time; add one: loadtest --concurrency 1"
            )
        points = []
        for name, result in alone:
            workers = result.workers
            stage = workers.queues.get("prefill_forward") if workers else None
            if workers is None or stage is None or workers.transfer is None:
                raise UserError(f"{name} has no figures of the workers; load-test a bundle, or name them: --worker URL")
            transfer = workers.transfer.mean_ms
            points.append((float(np.mean(result.prompt_tokens)), stage.mean_ms, transfer, result.ttft_ms.p50 or 0.0))
        tokens, prefill, transfer_ms, ttft = np.array(points).T
        per_token, base = _line(tokens, prefill)
        steps = [(decode_batch(result), result.tpot_ms.p50) for _, result in results if result.tpot_ms.p50]
        if not steps:
            raise UserError(f"{results[0][0]}: no answer has two tokens, so no decode step was measured")
        fitted: dict[str, Any] = {
            "prefill_tokens_per_s": 1e3 / per_token,
            "prefill_base_ms": base,
            "decode_step_ms": _by_batch(steps),
            "overhead_ms": max(0.0, float(np.median(ttft - base - per_token * tokens - transfer_ms))),
            "transfer_ms": float(np.median(transfer_ms)),
            "doubts": tuple(f"{name}: {r.client.bottleneck}" for name, r in results if r.client.bottleneck),
        }
        return cls(**(fitted | more))


def _by_batch(points: Sequence[tuple[float, float]]) -> dict[int, float]:
    """Means over the points of about a batch size, then read off at whole sizes."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for batch, ms in points:
        groups.setdefault(round(batch), []).append((batch, ms))
    batches, times = np.array([np.mean(groups[size], axis=0) for size in sorted(groups)]).T
    return {size: float(np.interp(size, batches, times)) for size in sorted(groups)}


def in_system(result: LoadResult) -> float:
    """Requests at once, by Little's law."""
    return result.requests_per_s * (result.e2e_ms.p50 or 0.0) / 1e3


def decode_batch(result: LoadResult) -> float:
    """Requests in the steps that made the tokens, on average.

    By Little's law N requests are in the system and D of them in decode. A request that decodes shares its steps with
    those of the N - 1 others that decode too: 1 + D (N - 1) / N, exact for independent clients of a closed loop.
    """
    total = in_system(result)
    decoding = result.output_tokens_per_s * (result.tpot_ms.p50 or 0.0) / 1e3
    return 1 + decoding * max(0.0, 1 - 1 / total) if total else 1.0


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of least squares, through 0 where the lengths tell no intercept or it would be negative."""
    if len(set(np.round(x))) > 1:
        slope, intercept = np.polyfit(x, y, 1)
        if slope > 0 and intercept >= 0:
            return float(slope), float(intercept)
    return float((x @ y) / (x @ x)), 0.0


def _result(name: str, data: dict[str, Any]) -> LoadResult:
    try:
        return LoadResult.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{name} is no result of this version's loadtest --json: {error.errors()[0]['msg']}") from None
