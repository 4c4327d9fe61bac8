"""metrics.json: the figures of one run under fixed keys, from typed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.bundle import write_atomic
from pdtrim_deploy.loadtest.base import LoadResult
from pdtrim_deploy.loadtest.rounds import Ratio
from pdtrim_deploy.plan import STAGES, PDPlan

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.quality import Quality


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanFigures(_Frozen):
    """The plan in numbers; `n_first`, `n_last` and `share` are those of the sparse layers (None: there is none).

    `*_pairs` counts pairs of blocks of which one student is left; `*_without_attention` and `*_without_mlp` name blocks
    of which the other sublayer runs alone.
    """

    digest: str
    blocks: int
    prefill_dropped: list[int]
    decode_dropped: list[int]
    prefill_pairs: int = 0
    decode_pairs: int = 0
    prefill_without_attention: list[int] = []
    prefill_without_mlp: list[int] = []
    decode_without_attention: list[int] = []
    decode_without_mlp: list[int] = []
    sparse_layers: int
    n_first: int | list[int] | None
    n_last: int | list[int] | None
    share: int | list[int] | None = None
    wire_dtype: str | list[str]

    @classmethod
    def of(cls, plan: PDPlan) -> PlanFigures:
        """Figures of `plan`; a value that differs by layer becomes the sorted list of its values."""
        sparse = [send for send in plan.kv if send.mode == "sparse"]
        missing = {
            f"{stage}_without_{sublayer}": [block for block, lacks in plan.missing(stage).items() if lacks == sublayer]
            for stage in STAGES
            for sublayer in ("attention", "mlp")
        }
        return cls(
            digest=plan.digest,
            blocks=plan.model.num_blocks,
            prefill_dropped=list(plan.dropped("prefill")),
            decode_dropped=list(plan.dropped("decode")),
            prefill_pairs=sum(action.kind == "distilled" for action in plan.prefill) // 2,
            decode_pairs=sum(action.kind == "distilled" for action in plan.decode) // 2,
            **missing,
            sparse_layers=len(sparse),
            n_first=_common([send.n_first for send in sparse]),
            n_last=_common([send.n_last for send in sparse]),
            share=_common([send.share for send in sparse]),
            wire_dtype=_common([send.wire_dtype for send in plan.kv]),
        )


class Counted(Protocol):
    """What prefill workers counted: transfers that ended well, and the KV bytes they carried."""

    @property
    def requests(self) -> int: ...

    @property
    def payload_bytes(self) -> int: ...


class TransferFigures(_Frozen):
    """KV bytes per request, averaged over `requests` of the pruned pair.

    Planned and dense are the plan's arithmetic, measured are the workers' counters (of the pruned and of the dense
    pair on the same prompts); `exact` says whether all four agree to the byte. `reduction` is dense over measured.
    `bfloat16_*` is the same against a bfloat16 pool, which production serves: its dense bytes are arithmetic.
    """

    requests: int
    prompt_tokens: float
    dense_bytes: float
    planned_bytes: float
    measured_bytes: float
    dense_measured_bytes: float
    reduction: float
    bfloat16_dense_bytes: float
    bfloat16_reduction: float
    exact: bool

    @classmethod
    def of(cls, plan: PDPlan, prompt_tokens: list[int], pruned: Counted, dense: Counted) -> TransferFigures:
        """From the prompt lengths of all requests and what was counted while they ran; 0 where nothing was sent."""
        count, transfers = max(1, len(prompt_tokens)), max(1, pruned.requests)
        dense_bytes = sum(map(plan.dense_bytes, prompt_tokens))
        bfloat16_bytes = sum(map(from_bfloat16(plan).dense_bytes, prompt_tokens))
        planned = sum(map(plan.payload_bytes, prompt_tokens))
        measured = pruned.payload_bytes / transfers
        return cls(
            requests=pruned.requests,
            prompt_tokens=sum(prompt_tokens) / count,
            dense_bytes=dense_bytes / count,
            planned_bytes=planned / count,
            measured_bytes=measured,
            dense_measured_bytes=dense.payload_bytes / max(1, dense.requests),
            reduction=round(dense_bytes / count / measured, 4) if measured else 0.0,
            bfloat16_dense_bytes=bfloat16_bytes / count,
            bfloat16_reduction=round(bfloat16_bytes / count / measured, 4) if measured else 0.0,
            exact=(planned, dense_bytes) == (pruned.payload_bytes, dense.payload_bytes),
        )


def from_bfloat16(plan: PDPlan) -> PDPlan:
    """`plan` with a bfloat16 KV pool: for its arithmetic."""
    model = plan.model.with_pool("native").model_copy(update={"kv_dtype": "bfloat16"})
    return plan.with_parts(model=model)


class QualityFigures(_Frozen):
    """Perplexity of `tokens` tokens of held-out text; `ratio` is PD over dense, `stderr` its paired standard error.

    The error is over sequences; None where there is a single one.
    """

    dense_ppl: float
    pd_ppl: float
    ratio: float
    stderr: float | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, quality: Quality) -> QualityFigures:
        """From the losses of the same sequences, dense and PD."""
        pairs = zip(quality.dense.nll_per_sequence, quality.pd.nll_per_sequence, strict=True)
        rises = [pd - dense for dense, pd in pairs]
        stderr = quality.ratio * stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else None
        return cls(
            dense_ppl=quality.dense.ppl,
            pd_ppl=quality.pd.ppl,
            ratio=quality.ratio,
            stderr=stderr,
            tokens=quality.tokens,
        )


class MemoryFigures(_Frozen):
    """Bytes of one pair: weights of each stage's checkpoint, and what a request of the load takes of decode's KV pool.

    The latter is the pool that decode's worker reports, over the requests of that length which it holds.
    """

    prefill_weights: int
    decode_weights: int
    decode_request: int


class LinkFigures(_Frozen):
    """The link that KV went over, one for each pair.

    Attributes:
        speed: of the link, for KV as it leaves a bfloat16 pool.
        relays: speed of the relay that stands for it: faster where a pair's own KV is wider than bfloat16.
        ttft_share: of the pair's median TTFT, the mean time that KV took; None where it was not counted.

    """

    speed: str
    relays: dict[str, str]
    ttft_share: dict[str, float | None]


class FidelityFigures(_Frozen):
    """Served logprobs against the oracle's, in nats; how many wrong plans (controls) the check told apart."""

    requests: int
    max_logprob_error: float
    tolerance: float
    controls: int
    controls_detected: int
    passed: bool


class LoadFigures(_Frozen):
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


class Metrics(_Frozen):
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


def _common(values: list[Any]) -> Any:
    distinct = sorted(set(values))
    return None if not distinct else distinct[0] if len(distinct) == 1 else distinct
