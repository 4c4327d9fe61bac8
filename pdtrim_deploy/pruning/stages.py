"""Choose what each stage loses: prefill first, then decode with prefill's losses forced in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.finalists import Finalist
from pdtrim_deploy.pruning.search import NO_COST, Progress
from pdtrim_deploy.pruning.search_logs import DECODE_AGAIN
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs, StageChoice, StageSearch, search_stage
from pdtrim_deploy.pruning.units import KINDS, Counts


@dataclass(frozen=True)
class StageRemovals:
    """Both choices; `prefill.removed` begins `decode.removed`, and what prefill distilled decode does too.

    Attributes:
        decode_losses: where decode was searched behind two of prefill's finalists, the judge's loss of decode behind
            each; the smaller one is the answer.
        passed_over: decode's finalists behind the other one.

    """

    prefill: StageChoice
    decode: StageChoice
    decode_losses: Mapping[Solution, float] = field(default_factory=dict)
    passed_over: tuple[Finalist, ...] = ()


def choose_stages(
    inputs: SearchInputs,
    prefill: int | Counts,
    decode: int | Counts,
    prompt_tokens: int | None = None,
    progress: Progress = lambda _: None,
) -> StageRemovals:
    """Save `prefill` and `decode` of the dense model on text `ids`, int64 `[S, T]`: blocks alone, or sublayers too.

    Prefill is judged by what it hands over, first token and KV. Decode loses whatever prefill loses, so the whole of
    that is one pruned model's loss: token t is the first token of a prompt of t tokens, and, of a shorter one, a token
    that the least pruned decode there can be reads from the KV handed over. It is the mean over tokens 1 .. T-1.

    Decode is judged as it will work: on tokens `prompt_tokens` + 1 .. T-1 (half of T when left out), reading KV that
    the pruned prefill model made.

    What is best for prefill need not be for decode. So where the judge likes another prefill better than the one that
    its search began with, decode is searched behind both, and the judge's loss of decode decides.

    Raises:
        UserError: decode loses fewer of a kind than prefill, more to remove than there is, loss not a number.

    """
    blocks = len(inputs.model.model.layers)
    lost_first, lost = (Counts(count) if isinstance(count, int) else count for count in (prefill, decode))
    for kind in KINDS:
        if lost.of(kind) < lost_first.of(kind):
            raise UserError(
                f"prefill_{kind}s is {lost_first.of(kind)} but decode_{kind}s is {lost.of(kind)}; "
                f"decode loses at least as many {kind}s as prefill"
            )
    if lost.blocks >= blocks:
        raise UserError(f"cannot remove {lost.blocks} of {blocks} blocks; remove at most {blocks - 1}")

    first_search: StageSearch | None = None
    if lost_first.total:
        first_search = search_stage(inputs, "prefill", "prefill", lost_first, 0, NOTHING, _named("prefill", progress))
    if lost == lost_first:
        choice = first_search.choice(first_search.best) if first_search else StageChoice()
        return StageRemovals(choice, StageChoice(choice.removed, choice.distilled))

    split = inputs.ids.shape[1] // 2 if prompt_tokens is None else prompt_tokens
    searches = {
        before: search_stage(inputs, "decode", name, lost, split, before, _named(name, progress))
        for before, name in zip(_prefills(first_search), ("decode", DECODE_AGAIN), strict=False)
    }
    losses = _decode_losses(inputs, searches)
    if losses:
        parts = [f"decode behind prefill without {before.label}: {loss:.4f}" for before, loss in losses.items()]
        progress("; ".join(parts))
    before = min(searches, key=lambda before: losses.get(before, 0.0))  # ties go to what prefill likes better
    best, others = searches[before], [search for other, search in searches.items() if other != before]
    first = first_search.choice(before) if first_search else StageChoice()
    second = best.choice(best.best, first.removed, reduce(add, (other.cost for other in others), NO_COST))
    return StageRemovals(first, second, losses, tuple(finalist for other in others for finalist in other.finalists))


def _prefills(prefill: StageSearch | None) -> list[Solution]:
    """What prefill may lose in front of decode's search: its best and, where the judge chose that, its start."""
    if prefill is None:
        return [NOTHING]
    return [*dict.fromkeys((prefill.best, *([prefill.start] if prefill.finalists else [])))]


def _decode_losses(inputs: SearchInputs, searches: Mapping[Solution, StageSearch]) -> dict[Solution, float]:
    """The judge's loss of decode behind each prefill, nats a token; empty where there is one prefill alone."""
    if len(searches) == 1 or inputs.final_round is None:
        return {}
    losses = {}
    for lost, search in searches.items():
        if search.finalists:
            losses[lost] = search.finalists[0].judged
        else:
            (losses[lost],) = inputs.final_round.judge("decode", lost, [search.best])
    return losses


def _named(name: str, progress: Progress) -> Callable[[str], None]:
    return lambda line: progress(f"{name}: {line}")
