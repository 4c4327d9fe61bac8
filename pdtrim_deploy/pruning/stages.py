"""Choose what each stage loses: prefill first, then decode with prefill's losses forced in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.evaluator import MEMORY, Evaluator, InProcess
from pdtrim_deploy.pruning.finalists import Finalist, Judge, last_word
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.search import (
    DEFAULTS,
    Problem,
    Progress,
    Search,
    SearchResult,
    Settings,
    Trajectory,
    get_search,
)
from pdtrim_deploy.pruning.solution import NOTHING, Solution


class Elsewhere(Protocol):
    """Makes the evaluator of one search, of `NextTokenLoss(model, ids, prompt_tokens, forced, students)`."""

    def __call__(
        self,
        objective: NextTokenLoss,
        ids: Tensor,
        prompt_tokens: int,
        forced: Solution,
        students: StudentLayers | None,
        memory: int,
    ) -> Evaluator: ...


@dataclass(frozen=True)
class StageRemovals:
    """The two searches; `prefill.removed` begins `decode.removed`, and what prefill distilled decode does too.

    `finalists` are those of each stage that had some, best first.
    """

    prefill: SearchResult
    decode: SearchResult
    finalists: Mapping[Stage, tuple[Finalist, ...]] = field(default_factory=dict)


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
    elsewhere: Elsewhere | None = None,
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

    Args:
        method: name of a search, or one of your own making.
        pairs, students: the distillation set by first blocks, and what its pairs become.
        memory, disk: bytes of hidden states kept in memory and in mapped files, at most.
        folder: where each search leaves `search-STAGE.jsonl` and goes on from it, and where those files are; None:
            nowhere, and in the system's temporary folder.
        elsewhere: where solutions are evaluated; None: in this process.
        judge, finalists: has the last word on so many solutions of each search; without it the search's answer stands.
        about: what else the answer depends on (JSON): the model, how students are made.

    Raises:
        UserError: unknown method, decode loses fewer than prefill, more to remove than there is, loss not a number.

    """
    search = get_search(method, settings) if isinstance(method, str) else method
    blocks = len(model.model.layers)
    if decode_blocks < prefill_blocks:
        raise UserError(
            f"prefill_blocks is {prefill_blocks} but decode_blocks is {decode_blocks}; "
            f"decode loses at least as many blocks as prefill"
        )
    if decode_blocks >= blocks:
        raise UserError(f"cannot remove {decode_blocks} of {blocks} blocks; remove at most {blocks - 1}")
    split = ids.shape[1] // 2 if prompt_tokens is None else prompt_tokens
    text, name = hashlib.sha256(ids.numpy().tobytes()).hexdigest(), method if isinstance(method, str) else repr(method)
    chain = [settings.seed, settings.steps]  # minutes only say where it ends
    said = [_VERSION, about, text, name, chain, sorted(protected), pairs]

    judged = dict[Stage, tuple[Finalist, ...]]()

    def solve(stage: Stage, remove: int, prompt: int, forced: Solution, note: Progress) -> SearchResult:
        path = folder / f"search-{stage}.jsonl" if folder else None
        trajectory = Trajectory(path, [*said, remove, prompt, vars(forced)])
        objective = NextTokenLoss(model, ids, prompt, forced, students)
        evaluator: Evaluator = InProcess(objective, memory, disk, folder)
        if elsewhere is not None:
            evaluator = elsewhere(objective, ids, prompt, forced, students, memory)
        problem = Problem(model, ids, objective, remove, forced, protected, pairs, trajectory, evaluator)
        found = search.run(problem, note)
        if judge is not None and finalists:
            found, ranked = last_word(stage, problem, found, judge, finalists, note)
            judged.update({stage: ranked} if ranked else {})
        return found

    prefill = SearchResult((), ())
    if prefill_blocks:
        prefill = solve("prefill", prefill_blocks, 0, NOTHING, _saying("prefill", progress))
    decode = SearchResult(prefill.removed, (), prefill.distilled)
    if decode_blocks > prefill_blocks:
        decode = solve("decode", decode_blocks, split, prefill.solution, _saying("decode", progress))
        decode = replace(decode, removed=(*prefill.removed, *decode.removed[len(prefill.removed) :]))
    return StageRemovals(prefill, decode, judged)


_VERSION = 2  # of how searches go; rows of another are thrown away


def _saying(stage: Stage, progress: Progress) -> Callable[[str], None]:
    return lambda line: progress(f"{stage}: {line}")
