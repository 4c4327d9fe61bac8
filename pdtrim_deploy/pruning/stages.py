"""Choose what each stage loses: prefill first, then decode with prefill's losses forced in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search import Problem, Progress, SearchResult, get_search


@dataclass(frozen=True)
class StageRemovals:
    """The two searches; `prefill.removed` begins `decode.removed`."""

    prefill: SearchResult
    decode: SearchResult


def choose_stages(
    model: CausalLM,
    ids: Tensor,
    prefill_blocks: int,
    decode_blocks: int,
    *,
    method: str = "greedy",
    prompt_tokens: int | None = None,
    protected: frozenset[int] = frozenset(),
    progress: Progress = lambda _: None,
) -> StageRemovals:
    """Remove `prefill_blocks` and `decode_blocks` of the dense model's blocks on text `ids`, int64 `[S, T]`.

    Prefill is judged as a whole model on all of the text. Decode is judged as it will work: on what follows the
    first `prompt_tokens` (half of T when left out), reading KV that the pruned prefill model made.

    Raises:
        UserError: unknown method, decode loses fewer than prefill, more to remove than there is, loss not a number.

    """
    search, blocks = get_search(method), len(model.model.layers)
    if decode_blocks < prefill_blocks:
        raise UserError(
            f"prefill_blocks is {prefill_blocks} but decode_blocks is {decode_blocks}; "
            f"decode loses at least as many blocks as prefill"
        )
    if decode_blocks >= blocks:
        raise UserError(f"cannot remove {decode_blocks} of {blocks} blocks; remove at most {blocks - 1}")
    prefill = SearchResult((), ())
    if prefill_blocks:
        objective = NextTokenLoss(model, ids)
        problem = Problem(model, ids, objective, prefill_blocks, protected=protected)
        prefill = search.run(problem, lambda line: progress(f"prefill: {line}"))
    decode = SearchResult(prefill.removed, ())
    if decode_blocks > prefill_blocks:
        split = ids.shape[1] // 2 if prompt_tokens is None else prompt_tokens
        objective = NextTokenLoss(model, ids, split, prefill.removed)
        problem = Problem(model, ids, objective, decode_blocks, prefill.removed, protected)
        decode = search.run(problem, lambda line: progress(f"decode: {line}"))
    return StageRemovals(prefill, decode)
