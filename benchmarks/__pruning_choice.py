"""Which blocks a method of benchmarks/pruning.py loses: its search is run, or an earlier row has its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from __pruning_methods import METHODS, Method, prefill_blocks
from __results import commit
from baselines import BASELINES
from torch import Tensor

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.plan import STAGES, ModelShape
from pdtrim_deploy.pruning.cached_judge import CachedJudge
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.cost import search_cost
from pdtrim_deploy.pruning.finalists import FinalRound
from pdtrim_deploy.pruning.judging_cost import judged_forwards
from pdtrim_deploy.pruning.refit_judge import VERSION, RefitJudge
from pdtrim_deploy.pruning.search import Search, Settings, get_search
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import StageRemovals, choose_stages
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.recipe import CalibrationSection
from pdtrim_deploy.recipe.healing import StudentsSection
from pdtrim_deploy.recipe.pruning import PruningSection

Note = Callable[[str], None]
JUDGED = 32  # sequences, the last of the text, that finalists are judged on; students learn from those before


@dataclass(frozen=True)
class Setup:
    """What all methods share.

    Attributes:
        ids: what blocks are chosen on, int64 `[S, T]`; `text`: what weights are fitted to, begins with `ids`.
        training_steps: of healing, a stage. The layer of LLM-Streamline gets as many more as its steps are cheaper.
        folder: where searches and fitted weights are kept.

    """

    model: CausalLM
    shape: ModelShape
    ids: Tensor
    text: Tensor
    steps: int
    training_steps: int
    folder: Path
    note: Note

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """The distillation set."""
        return find(self.model, self.ids).distillation

    @cached_property
    def students(self) -> Students:
        """Training-free, each made once: for a second run too."""
        kept, of = Cache(self.folder), self.shape.fingerprint
        return Students(self.model, self.text[:-JUDGED], StudentsSection(), cache=kept, fingerprint=of, note=self.note)

    @property
    def distilling(self) -> int:
        """Block-forwards of finding D and of fitting all of its students: a pass each, and two starts for each."""
        taught = len(self.text[:-JUDGED])
        return self.shape.num_blocks * (len(self.ids) + taught) + 2 * taught * len(self.pairs)


@dataclass(frozen=True)
class Choice:
    """What a method loses, what that loses on the text that chose, the cost of finding it and the commit that did."""

    prefill: Solution
    decode: Solution
    prefill_loss: float
    calibration_loss: float
    seconds: float | None
    block_forwards: int
    chosen_at: str

    @property
    def as_row(self) -> dict[str, Any]:
        """The columns of a row of results."""
        return vars(self) | {"prefill": str(self.prefill), "decode": str(self.decode)}

    @classmethod
    def read(cls, row: dict[str, Any]) -> Choice:
        """The inverse of `as_row`."""
        row = {"chosen_at": row["commit"]} | row  # older rows have one commit for both
        values = {field.name: row[field.name] for field in fields(cls)}
        return cls(**values | {stage: Solution.read(row[stage]) for stage in STAGES})


def choose(setup: Setup, name: str, removed: int, seed: int, known: Choice | None = None) -> Choice:
    """What a method loses, prefill a third as many; `known` is how one that chooses alike has answered before."""
    method = METHODS[name]
    choice = known or _searched(setup, method, removed, seed)
    if method.published:  # such a search is counted, not run
        return replace(choice, seconds=None, block_forwards=_published(setup, removed))
    return choice


def _searched(setup: Setup, method: Method, removed: int, seed: int) -> Choice:
    """What a search wrote down stays in its folder, which those that search alike share: a stopped one goes on."""
    settings = Settings(seed, setup.steps if method.search == "anneal" else 0)
    search: Search
    if method.search == "sleb-cached":
        search = Greedy(race_z=None)
    elif method.search in BASELINES:
        search = BASELINES[method.search].search(settings)
    else:
        search = get_search(method.search, settings)
    about: object = setup.shape.fingerprint
    if method.distil:
        about = [about, len(setup.text[:-JUDGED])]  # what students learned from
    protected = frozenset[int]()
    if method.search == "sleb-cached":
        protected = frozenset({0, setup.shape.num_blocks - 1})  # as SLEB has it
    steps = f"-{setup.steps}" if method.search == "anneal" else ""
    baselines = {name: get_search(name) for name in method.baselines}
    inputs = SearchInputs(
        setup.model,
        setup.ids,
        search,
        protected=protected,
        pairs=setup.pairs if method.distil else (),
        students=setup.students if method.distil else None,
        folder=setup.folder / f"{method.search}{'-distil' * method.distil}{steps}-{removed}-{seed}",
        about=about,
        final_round=FinalRound(_judge(setup, method), method.finalists, baselines) if method.finalists else None,
    )
    removals = choose_stages(inputs, prefill_blocks(removed), removed, progress=setup.note)
    cost = removals.prefill.cost + removals.decode.cost
    return Choice(
        removals.prefill.solution,
        removals.decode.solution,
        removals.prefill.loss,
        removals.decode.loss,
        cost.seconds,
        cost.block_forwards + method.distil * setup.distilling + _judging(setup, removals),
        commit(),
    )


def _judge(setup: Setup, method: Method) -> CachedJudge:
    """Gives the same loss to finalists that another seed or method had judged."""
    students, text = setup.students if method.distil else None, setup.text[-JUDGED:]
    judge = RefitJudge(setup.model, setup.shape, text, method.compensation, students, setup.note)
    about = [VERSION, setup.shape.fingerprint, method.compensation, len(setup.text), len(text)]
    return CachedJudge(judge, setup.folder / f"judged-{method.compensation}-{len(setup.text)}.jsonl", about)


def _judging(setup: Setup, removals: StageRemovals) -> int:
    """Block-forwards of judging finalists, at most."""
    choices = removals.prefill, removals.decode
    lost, counts = [choice.solution.saved for choice in choices], [len(choice.finalists) for choice in choices]
    size, texts = (setup.shape.num_blocks, *lost), len(setup.text[-JUDGED:])
    again = judged_forwards(*size, texts, 0, len(removals.passed_over))
    return judged_forwards(*size, texts, *counts) + again


def _published(setup: Setup, removed: int) -> int:
    """Block-forwards of SLEB that keeps nothing."""
    config, (count, length) = setup.model.config.to_dict(), setup.ids.shape
    section = PruningSection(prefill_blocks=prefill_blocks(removed), decode_blocks=removed)
    text = CalibrationSection(sequences=count, length=length)
    cost = search_cost(config, section, text, work=BASELINES["sleb"].work)
    assert cost is not None
    return cost.most
