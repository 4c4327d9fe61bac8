"""A plan in numbers, and the KV bytes that it plans beside those that workers counted."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.plan import STAGES, PDPlan


class FrozenFigures(BaseModel):
    """Figures of metrics.json: no key but these, none changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanFigures(FrozenFigures):
    """The plan in numbers; `n_first`, `n_last` and `share` are those of the sparse layers (None: there is none).

    `*_pairs` counts pairs of blocks of which one student is left; `prefill_kv_only` names blocks that prefill runs for
    their K and V alone, but for the last `prefill_kv_only_tail` tokens of a prompt; `*_without_attention` and
    `*_without_mlp` name blocks of which the other sublayer runs alone.
    """

    digest: str
    blocks: int
    prefill_dropped: list[int]
    decode_dropped: list[int]
    prefill_pairs: int = 0
    decode_pairs: int = 0
    prefill_kv_only: list[int] = []
    prefill_kv_only_tail: int = 0
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
            prefill_kv_only=[block for block, action in enumerate(plan.prefill) if action.kind == "kv_only"],
            prefill_kv_only_tail=plan.kv_only_tail,
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


class TransferFigures(FrozenFigures):
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


def _common(values: list[Any]) -> Any:
    distinct = sorted(set(values))
    return None if not distinct else distinct[0] if len(distinct) == 1 else distinct
