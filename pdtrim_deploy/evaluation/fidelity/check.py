"""Compare served tokens with the oracle, and make sure that the comparison could fail.

A served token must have the oracle's logprob to within the tolerance, teacher-forced on the served tokens. The
controls score the same tokens under plans that differ a little (all rows sent; one first or one last row less): each
must miss the tolerance somewhere, or the check proves nothing and fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cache import Cache
from pdtrim_deploy.evaluation.fidelity.cases import Group, groups, text_needed
from pdtrim_deploy.evaluation.fidelity.client import Served, ask
from pdtrim_deploy.evaluation.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats; 16-bit sums differ by their order
CONTROL_MIN_TOKENS = 129  # shorter prompts hardly notice one row


@dataclass(frozen=True)
class Row:
    """One prompt: its situation, sizes in tokens, and the largest logprob difference in nats."""

    group: str
    prompt_tokens: int
    cached_tokens: int
    error: float


@dataclass(frozen=True)
class FidelityResult:
    """The verdict. `controls` gives each control's largest difference in nats."""

    tolerance: float
    max_logprob_error: float
    controls: dict[str, float]
    rows: tuple[Row, ...]

    @property
    def requests(self) -> int:
        """Prompts compared."""
        return len(self.rows)

    @property
    def controls_detected(self) -> dict[str, bool]:
        """Whether each control was told apart."""
        return {name: error > self.tolerance for name, error in self.controls.items()}

    @property
    def passed(self) -> bool:
        """Every prompt within the tolerance, every control outside it."""
        return self.max_logprob_error <= self.tolerance and all(self.controls_detected.values())

    def to_json(self) -> dict[str, Any]:
        """JSON form, with the derived values."""
        derived = {"requests": self.requests, "controls_detected": self.controls_detected, "passed": self.passed}
        return asdict(self) | derived


def run_fidelity(
    bundle: Bundle,
    base_url: str,
    cache: Cache,
    new_tokens: int = 12,
    seed: int = 0,
    deadline_s: float = 120.0,
    progress: Callable[[str], None] = lambda _: None,
) -> FidelityResult:
    """Drive the pair behind `base_url` (its router) and judge it by the oracle of `bundle`.

    Raises:
        UserError: the server refused or failed a request, or the corpus is too short.

    """
    from pdtrim_deploy.checkpoints.loading import load_model, load_tokenizer
    from pdtrim_deploy.evaluation import corpora

    count, length = text_needed(bundle.plan)
    documents = corpora.load(bundle.recipe.evaluation.corpus, cache).split("final")
    texts = corpora.sequences(documents, load_tokenizer(bundle.prefill_dir), count, length, seed).tolist()
    served: list[tuple[Group, Served]] = []
    for group in groups(bundle.plan, texts):
        progress(f"fidelity: {group.name}, {len(group.prompts)} prompts {group.how}")
        served += [(group, row) for row in ask(base_url, group, new_tokens, deadline_s)]
    progress("fidelity: scoring the served tokens with the oracle")
    dtype = bundle.plan.model.kv_dtype
    prefill, decode = load_model(bundle.prefill_dir, dtype), load_model(bundle.decode_dir, dtype)
    return judge(PDOracle(prefill, decode, bundle.plan), served)


def judge(oracle: PDOracle, served: list[tuple[Group, Served]]) -> FidelityResult:
    """Score served tokens under the plan and under its controls."""
    rows, control_errors = [], dict.fromkeys(_controls(oracle.plan, CONTROL_MIN_TOKENS), 0.0)
    for group, one in served:
        state = oracle.prefill(torch.tensor([one.prompt]))

        def error(judge: PDOracle, state: Any = state, one: Served = one) -> float:
            scored = judge.score(state, torch.tensor([one.tokens]))[0]
            return (scored - torch.tensor(one.logprobs)).abs().max().item()

        rows.append(Row(group.name, len(one.prompt), one.cached_tokens, error(oracle)))
        if len(one.prompt) >= CONTROL_MIN_TOKENS:
            for name, kv in _controls(oracle.plan, len(one.prompt)).items():
                control_errors[name] = max(control_errors[name], error(oracle.with_kv(kv)))
    dtype = oracle.plan.model.kv_dtype
    return FidelityResult(TOLERANCE[dtype], max(row.error for row in rows), control_errors, tuple(rows))


def _controls(plan: PDPlan, prompt_tokens: int) -> dict[str, tuple[KVSend, ...]]:
    """KV rules that a right comparison tells apart from the plan's."""
    sparse = [send for send in plan.kv if send.mode == "sparse"]
    if not sparse:
        without_first = KVSend(mode="sparse", n_last=prompt_tokens - 1)
        without_last = KVSend(mode="sparse", n_first=prompt_tokens - 1)
        return {
            "first row missing": (without_first,) * len(plan.kv),
            "last row missing": (without_last,) * len(plan.kv),
        }
    changed = {"dense plan": tuple(KVSend(wire_dtype=send.wire_dtype) for send in plan.kv)}
    for side in ("n_first", "n_last"):
        if all(getattr(send, side) > 0 and send.n_first + send.n_last > 1 for send in sparse):
            changed[f"{side} - 1"] = tuple(_less(send, side) if send.mode == "sparse" else send for send in plan.kv)
    return changed


def _less(send: KVSend, side: str) -> KVSend:
    return send.model_copy(update={side: getattr(send, side) - 1})
