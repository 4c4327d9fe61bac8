"""Choose what each stage loses: prefill first, then decode with prefill's losses forced in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.plan import STAGES, Stage
from pdtrim_deploy.pruning.evaluator import MEMORY
from pdtrim_deploy.pruning.finalists import Finalist, Judge, with_answer
from pdtrim_deploy.pruning.objective import StudentLayers
from pdtrim_deploy.pruning.search import DEFAULTS, Progress, Search, SearchResult, Settings
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.stage_search import EvaluatorFactory, StageResult, StageSearch

DECODE_AGAIN = "decode-again"  # decode's search behind where prefill's began


@dataclass(frozen=True)
class StageRemovals:
    """The two searches; `prefill.removed` begins `decode.removed`, and what prefill distilled decode does too.

    Attributes:
        finalists: of each stage that had some, best first in the judge's eyes. Where two of prefill's had decode
            searched behind them, theirs have `behind`, and the smaller one is the answer.
        passed_over: decode's finalists behind the other one.

    """

    prefill: SearchResult
    decode: SearchResult
    finalists: Mapping[Stage, tuple[Finalist, ...]] = field(default_factory=dict)
    passed_over: tuple[Finalist, ...] = ()


def choose_stages(
    model: CausalLM,
    ids: Tensor,
    prefill_blocks: int,
    decode_blocks: int,
    *,
    method: str | Search = "greedy",
    settings: Settings = DEFAULTS,
    prompt_tokens: int | None = None,
    protected: frozenset[int] = frozenset(),
    pairs: tuple[int, ...] = (),
    students: StudentLayers | None = None,
    memory: int = MEMORY,
    disk: int = 0,
    folder: Path | None = None,
    about: object = None,
    evaluator_factory: EvaluatorFactory | None = None,
    judge: Judge | None = None,
    finalists: int = 0,
    progress: Progress = lambda _: None,
) -> StageRemovals:
    """Save `prefill_blocks` and `decode_blocks` of the dense model's blocks on text `ids`, int64 `[S, T]`.

    Prefill is judged by what it hands over, first token and KV. Decode loses whatever prefill loses, so the whole of
    that is one pruned model's loss: token t is the first token of a prompt of t tokens, and, of a shorter one, a token
    that the least pruned decode there can be reads from the KV handed over. It is the mean over tokens 1 .. T-1.

    Decode is judged as it will work: on tokens `prompt_tokens` + 1 .. T-1 (half of T when left out), reading KV that
    the pruned prefill model made.

    What is best for prefill need not be for decode. So where the judge likes another prefill better than the one that
    its search began with, decode is searched behind both, and the judge chooses.

    Args:
        method: name of a search, or one of your own making.
        pairs, students: the distillation set by first blocks, and what its pairs become.
        memory, disk: bytes of hidden states kept in memory and in mapped files, at most.
        folder: where each search leaves `search-STAGE.jsonl` (the second of decode `search-decode-again.jsonl`), and
            its finalists `search-STAGE-finalists.jsonl`, and goes on from them, and where those files are; None:
            nowhere, and in the system's temporary folder.
        elsewhere: where solutions are evaluated; None: in this process.
        judge, finalists: has the last word on so many solutions of each search; without it the search's answer stands.
        about: what else the answer depends on (JSON): the model, how students are made.

    Raises:
        UserError: unknown method, decode loses fewer than prefill, more to remove than there is, loss not a number.

    """
    shared = model, ids, method, settings, protected, pairs, students, memory, disk, folder, about, evaluator_factory
    searches = StageSearch(*shared, judge, finalists)
    blocks = len(model.model.layers)
    if decode_blocks < prefill_blocks:
        raise UserError(
            f"prefill_blocks is {prefill_blocks} but decode_blocks is {decode_blocks}; "
            f"decode loses at least as many blocks as prefill"
        )
    if decode_blocks >= blocks:
        raise UserError(f"cannot remove {decode_blocks} of {blocks} blocks; remove at most {blocks - 1}")
    split = ids.shape[1] // 2 if prompt_tokens is None else prompt_tokens

    prefill = StageResult(SearchResult((), ()), NOTHING)
    if prefill_blocks:
        prefill = searches.run("prefill", "prefill", prefill_blocks, 0, NOTHING, _saying("prefill", progress))
    lost = prefill.result.solution
    if decode_blocks == prefill_blocks:
        decode = SearchResult(prefill.result.removed, (), lost.distilled)
        return StageRemovals(prefill.result, decode, _named(prefill=prefill))

    def behind(lost: Solution, name: str) -> StageResult:
        return searches.run("decode", name, decode_blocks, split, lost, _saying(name, progress))

    decode_found = behind(lost, "decode")
    if judge is None or not prefill.finalists or prefill.start == lost:
        decode = _nested(prefill.result, decode_found.result)
        return StageRemovals(prefill.result, decode, _named(prefill=prefill, decode=decode_found))
    again = behind(prefill.start, DECODE_AGAIN)
    judged = {lost: decode_found.judged(judge, lost), prefill.start: again.judged(judge, prefill.start)}
    progress("; ".join(f"decode behind prefill without {one}: {loss:.4f}" for one, loss in judged.items()))
    return _better(prefill, decode_found, again, judged)


def _better(
    prefill: StageResult, decode: StageResult, again: StageResult, judged: Mapping[Solution, float]
) -> StageRemovals:
    """Of `decode` behind prefill's answer and `again` behind its start; ties go to the former."""
    prefill = replace(prefill, finalists=tuple(replace(o, behind=judged.get(o.solution)) for o in prefill.finalists))
    first, best, other = prefill.result, decode, again
    if judged[prefill.start] < judged[first.solution]:
        start = next(one for one in prefill.finalists if one.solution == prefill.start)
        first, best, other = with_answer(first, NOTHING, start), again, decode
    result = _dearer(_nested(first, best.result), other.result)
    return StageRemovals(first, result, _named(prefill=prefill, decode=best), other.finalists)


def _named(**found: StageResult) -> dict[Stage, tuple[Finalist, ...]]:
    return {stage: found[stage].finalists for stage in STAGES if stage in found and found[stage].finalists}


def _nested(prefill: SearchResult, decode: SearchResult) -> SearchResult:
    """Decode's result with what prefill removed in front, in its order."""
    return replace(decode, removed=(*prefill.removed, *decode.removed[len(prefill.removed) :]))


def _dearer(found: SearchResult, other: SearchResult) -> SearchResult:
    """`found` at the cost of both."""
    last, more = found.trajectory[-1], other.trajectory[-1]
    cost = replace(last, seconds=last.seconds + more.seconds, block_forwards=last.block_forwards + more.block_forwards)
    return replace(found, trajectory=(*found.trajectory[:-1], cost))


def _saying(name: str, progress: Progress) -> Callable[[str], None]:
    return lambda line: progress(f"{name}: {line}")
