"""Compare served tokens with the oracle, and make sure that the comparison could fail.

Served tokens must have the oracle's logprobs, teacher-forced on the served tokens, to within tolerances: one for the
worst prompt, one for the typical (median) prompt. Both are those of the plan: `FACTOR` times what rounding alone moves
the oracle by (`sensitivity`), since a wire dtype that rounds coarsely makes more of it, and at least `TOLERANCE`. A
code that tips over moves one prompt a lot and seldom: where few prompts are off, rounding is tried on these many times.
The controls score the tokens of some long prompts under plans that differ a little (`controls`): each must miss a
tolerance by `POWER` times, or the check proves nothing and fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.fidelity.cases import Group, groups, text_needed
from pdtrim_deploy.evaluation.fidelity.client import Served, ask
from pdtrim_deploy.evaluation.fidelity.controls import wrong_oracles
from pdtrim_deploy.evaluation.fidelity.sensitivity import NOISE, score_shaken
from pdtrim_deploy.evaluation.limits import fit_judging
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.body import check_body
from pdtrim_deploy.models.oracle import PDOracle

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats; 16-bit sums differ by their order
TYPICAL = 0.25  # of that
FACTOR, POWER = 3.0, 2.0
FEW, AGAIN = 8, 16  # one prompt in so many may be off and be looked at again, with so many times the draws
CONTROL_MIN_TOKENS = 129  # shorter prompts hardly notice one row
CONTROL_PROMPTS = 8


@dataclass(frozen=True)
class Row:
    """One prompt: its situation, sizes in tokens, largest logprob difference in nats, and that of rounding alone."""

    group: str
    prompt_tokens: int
    cached_tokens: int
    error: float
    sensitivity: float


@dataclass(frozen=True)
class Size:
    """How far logprobs lie apart, in nats: on the worst prompt, and on the median of the long ones."""

    worst: float
    typical: float

    def ratio(self, to: Size) -> float:
        """In units of `to`, the larger of both."""
        return max(self.worst / to.worst, self.typical / to.typical)


@dataclass(frozen=True)
class FidelityResult:
    """The verdict: served `error` against `allowed`; `sensitivity` is what rounding of size `noise` does."""

    error: Size
    allowed: Size
    sensitivity: Size
    noise: float
    control_sizes: dict[str, Size]
    rows: tuple[Row, ...]

    @property
    def requests(self) -> int:
        """Prompts compared."""
        return len(self.rows)

    @property
    def max_logprob_error(self) -> float:
        """Largest difference of any prompt."""
        return self.error.worst

    @property
    def tolerance(self) -> float:
        """What it may be."""
        return self.allowed.worst

    @property
    def controls(self) -> dict[str, float]:
        """Each control's largest difference."""
        return {name: size.worst for name, size in self.control_sizes.items()}

    @property
    def controls_detected(self) -> dict[str, bool]:
        """Whether each control was told apart."""
        return {name: size.ratio(self.allowed) > POWER for name, size in self.control_sizes.items()}

    @property
    def problems(self) -> list[str]:
        """Why the check failed, one sentence each; empty when it passed."""
        sentences = []
        for name in ("worst", "typical"):
            error, allowed = getattr(self.error, name), getattr(self.allowed, name)
            if not error <= allowed:
                sentences.append(f"the {name} prompt is off by {error:.1e} nats, {allowed:.1e} are allowed")
        for name in (name for name, seen in self.controls_detected.items() if not seen):
            times = self.control_sizes[name].ratio(self.allowed)
            sentences.append(
                f"the check is blind to the wrong plan '{name}': it differs by {times:.1f} times what this plan's "
                f"sensitivity to rounding makes us allow, at least {POWER:g} are needed"
            )
        return sentences

    @property
    def passed(self) -> bool:
        """Served within what is allowed, every control well outside it."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """JSON form, with the derived values."""
        derived = ("requests", "max_logprob_error", "tolerance", "controls", "controls_detected", "problems", "passed")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def run_fidelity(
    bundle: Bundle,
    base_url: str,
    cache: Cache,
    new_tokens: int = 12,
    seed: int = 0,
    deadline_s: float = 120.0,
    progress: Callable[[str], None] = lambda _: None,
    compute: Compute | None = None,
) -> FidelityResult:
    """Drive the pair behind `base_url` (its router) and judge it by the oracle of `bundle`.

    The oracle computes as `compute` says; by default on this CPU, in what it is fast at.

    Raises:
        UserError: the server refused or failed a request, or is no pair's, the corpus is too short, or the bundle
            lacks the weights that its plan has before a tail.
        ServingError: it does not answer, or not in time.

    """
    from pdtrim_deploy.evaluation import corpora
    from pdtrim_deploy.models.loading import load_tokenizer

    check_body(bundle.prefill_dir, bundle.plan)  # the oracle reads it, once the pair has answered
    count, length = text_needed(bundle.plan)
    documents = corpora.load(bundle.recipe.evaluation.corpus, cache).split("final")
    texts = corpora.sequences(documents, load_tokenizer(bundle.prefill_dir), count, length, seed).tolist()
    served: list[tuple[Group, Served]] = []
    for group in groups(bundle.plan, texts):
        progress(f"fidelity: {group.name}, {len(group.prompts)} prompts {group.how}")
        served += [(group, row) for row in ask(base_url, group, new_tokens, deadline_s)]
    progress("fidelity: scoring the served tokens with the oracle")
    if compute is not None:
        most = max(len(row.prompt) for _, row in served)
        compute = fit_judging([bundle.weight_folders], most, compute)
    return judge(oracle_of(bundle, progress, compute, rounds_inputs=True), served, progress)


def judge(
    oracle: PDOracle, served: list[tuple[Group, Served]], progress: Callable[[str], None] = lambda _: None
) -> FidelityResult:
    """Score served tokens under the plan, under the plan with rounding noise, and under its controls."""
    rows: list[Row] = []
    wrong: dict[str, list[float]] = {name: [] for name in wrong_oracles(oracle, CONTROL_MIN_TOKENS)}
    for seed, (group, answer) in enumerate(served):
        if seed % 8 == 0:
            progress(f"fidelity: scored {seed}/{len(served)} prompts")
        state, tokens = oracle.prefill(torch.tensor([answer.prompt])), torch.tensor(answer.tokens)
        reported = torch.tensor(answer.logprobs)
        right, shaken = score_shaken(oracle, state, tokens, seed)
        error, shift = ((other - right).abs().max().item() for other in (reported, shaken))
        rows.append(Row(group.name, len(answer.prompt), answer.cached_tokens, error, shift))
        if len(answer.prompt) >= CONTROL_MIN_TOKENS and all(len(errors) < CONTROL_PROMPTS for errors in wrong.values()):
            for name, control in wrong_oracles(oracle, len(answer.prompt)).items():
                same = control.plan.kv_only_tail == oracle.plan.kv_only_tail
                held = state if same else control.prefill(torch.tensor([answer.prompt]))
                other = control.score(held, tokens[None])[0]
                wrong.setdefault(name, []).append((reported - other).abs().max().item())
    dtype = oracle.plan.model.kv_dtype
    measured, moved, allowed = _sizes(rows, dtype)
    off = [at for at, row in enumerate(rows) if row.error > allowed.worst]
    if 0 < len(off) <= max(1, len(rows) // FEW):
        again = {at: _shaken_again(oracle, served[at][1], rows[at], seed=len(served) + AGAIN * at) for at in off}
        if all(row.error <= FACTOR * row.sensitivity for row in again.values()):  # each by its own draws
            rows = [again.get(at, row) for at, row in enumerate(rows)]
            measured, moved, allowed = _sizes(rows, dtype)
    sizes = {name: Size(_most(off_by), median(off_by)) for name, off_by in wrong.items() if off_by}
    return FidelityResult(measured, allowed, moved, NOISE[dtype], sizes, tuple(rows))


def _sizes(rows: list[Row], dtype: str) -> tuple[Size, Size, Size]:
    """Of the error, of rounding, and what is allowed."""
    long = [row for row in rows if row.prompt_tokens >= CONTROL_MIN_TOKENS] or rows
    error, moved = (
        Size(_most([getattr(row, name) for row in rows]), median(getattr(row, name) for row in long))
        for name in ("error", "sensitivity")
    )
    least = TOLERANCE[dtype]
    return error, moved, Size(max(least, FACTOR * moved.worst), max(TYPICAL * least, FACTOR * moved.typical))


def _shaken_again(oracle: PDOracle, answer: Served, row: Row, seed: int) -> Row:
    """The row, its sensitivity from many more draws."""
    state, tokens, most = oracle.prefill(torch.tensor([answer.prompt])), torch.tensor(answer.tokens), row.sensitivity
    for more in range(AGAIN):
        right, shaken = score_shaken(oracle, state, tokens, seed + more)
        most = max(most, (shaken - right).abs().max().item())
    return replace(row, sensitivity=most)


def _most(sizes: list[float]) -> float:
    """The largest; NaN when one is."""
    return torch.tensor(sizes).max().item()
