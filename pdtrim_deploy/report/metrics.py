"""metrics.json: the figures of one run under fixed keys, from typed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.loadtest.base import LoadResult
from pdtrim_deploy.loadtest.rounds import Ratio
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.report.plan_figures import FrozenFigures, PlanFigures, TransferFigures

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.quality import Quality


class QualityFigures(FrozenFigures):
    """Perplexity of `tokens` tokens of held-out text; `ratio` is PD over dense, `stderr` its paired standard error.

    The error is over documents; None where there is a single one.
    """

    dense_ppl: float
    pd_ppl: float
    ratio: float
    stderr: float | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, quality: Quality) -> QualityFigures:
        """From the losses of the same sequences, dense and PD."""
        from pdtrim_deploy.evaluation.quality import measured

        dense, pd = (measured(side.nll_per_sequence, quality.documents) for side in (quality.dense, quality.pd))
        error = pd.against(dense, "nll").stderr
        stderr = None if math.isnan(error) else quality.ratio * error
        return cls(
            dense_ppl=quality.dense.ppl,
            pd_ppl=quality.pd.ppl,
            ratio=quality.ratio,
            stderr=stderr,
            tokens=quality.tokens,
        )


class MemoryFigures(FrozenFigures):
    """Bytes of one pair: weights of each stage's checkpoint, and what a request of the load takes of decode's KV pool.

    The latter is the pool that decode's worker reports, over the requests of that length which it holds.
    """

    prefill_weights: int
    decode_weights: int
    decode_request: int


class LinkFigures(FrozenFigures):
    """The link that KV went over, one for each pair.

    Attributes:
        speed: of the link, for KV as it leaves a bfloat16 pool.
        relays: speed of the relay that stands for it: faster where a pair's own KV is wider than bfloat16.
        ttft_share: of the pair's median TTFT, the mean time that KV took; None where it was not counted.

    """

    speed: str
    relays: dict[str, str]
    ttft_share: dict[str, float | None]


class FidelityFigures(FrozenFigures):
    """Served logprobs against the oracle's, in nats; how many wrong plans (controls) the check told apart."""

    requests: int
    max_logprob_error: float
    tolerance: float
    controls: int
    controls_detected: int
    passed: bool


class LoadFigures(FrozenFigures):
    """The head of a load; the whole result is under `detail`."""

    requests: int
    failed: int
    ttft_ms_p50: float | None
    itl_ms_p50: float | None
    output_tokens_per_s: float
    detail: LoadResult

    @classmethod
    def of(cls, result: LoadResult) -> LoadFigures:
        """The head of `result`."""
        return cls(
            requests=result.requests,
            failed=result.failed,
            ttft_ms_p50=result.ttft_ms.p50,
            itl_ms_p50=result.itl_ms.p50,
            output_tokens_per_s=result.output_tokens_per_s,
            detail=result,
        )


class Metrics(FrozenFigures):
    """Everything that a demo run measures; `ratios` are pruned over dense, by round, `dropped` says what has none."""

    plan: PlanFigures
    transfer: TransferFigures
    quality: QualityFigures
    fidelity: FidelityFigures
    load: dict[str, LoadFigures]
    memory: dict[str, MemoryFigures] | None = None
    link: LinkFigures | None = None
    ratios: tuple[Ratio, ...] = ()
    dropped: tuple[str, ...] = ()
    environment: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        """What a reader must know before believing the rest; empty when all is well."""
        sentences = []
        if not self.fidelity.passed:
            sentences.append("the served pair does not match the oracle, or a control was not told apart")
        if not self.transfer.exact:
            sentences.append("the bytes counted are not those of the plan")
        sentences += [
            f"{figures.failed} requests of the {name} pair failed"
            for name, figures in self.load.items()
            if figures.failed
        ]
        return sentences

    def write(self, path: Path) -> None:
        """Write metrics.json whole or not at all."""
        write_atomic(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")
