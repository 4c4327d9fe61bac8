"""What benchmarks/pruning.py compares: which search chooses, and what is done for the blocks that are left."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.plan import STAGES, KVSend, ModelShape, PDPlan, Stage
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.healing import heal
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.search import Search, Settings
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.stages import StageRemovals, choose_stages
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.pruning.students.regression import teach
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.recipe_healing import HealingSection, StudentsSection

Note = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        search: registered, or `sleb-cached`: SLEB with hidden states kept in front of every block, no racing.
        seeded: whether seeds change it.
        trained: whether gradients are taken; the others are compared among themselves.
        layer: LLM-Streamline's: the block in front of each removed window is taught to stand for both.

    """

    search: str
    seeded: bool = False
    distil: bool = False
    compensation: str = "none"
    healed: bool = False
    layer: bool = False

    @property
    def trained(self) -> bool:
        """Whether it takes gradient steps."""
        return self.healed or self.layer


METHODS = {
    "random": Method("random", seeded=True),
    "ShortGPT": Method("cosine"),
    "Shortened LLaMA": Method("perplexity"),
    "LLM-Streamline, no layer": Method("streamline"),
    "SLEB": Method("sleb"),
    "SLEB, cached": Method("sleb-cached"),
    "ours, greedy": Method("greedy"),
    "ours, no D": Method("anneal", seeded=True),
    "ours, no annealing": Method("greedy", compensation="least-squares"),
    "ours, no compensation": Method("anneal", seeded=True, distil=True),
    "ours": Method("anneal", seeded=True, distil=True, compensation="least-squares"),
    "LLM-Streamline": Method("streamline", layer=True),
    "ours, healed": Method("anneal", seeded=True, distil=True, compensation="least-squares", healed=True),
}


@dataclass(frozen=True)
class Setup:
    """What all methods share: `ids` is calibration text, int64 `[S, T]`."""

    model: CausalLM
    shape: ModelShape
    ids: Tensor
    steps: int
    training_steps: int
    folder: Path
    note: Note


def choose(setup: Setup, name: str, removed: int, seed: int) -> StageRemovals:
    """Prefill loses a third as many. What a search wrote down stays in the folder: a stopped one goes on."""
    method = METHODS[name]
    search: str | Search = method.search
    if search == "sleb-cached":
        search = _CachedSLEB()
    about, protected = setup.shape.fingerprint, frozenset[int]()
    if method.search == "sleb-cached":
        protected = frozenset({0, setup.shape.num_blocks - 1})  # as SLEB has it
    students = _students(setup) if method.distil else None
    return choose_stages(
        setup.model,
        setup.ids,
        prefill_blocks(removed),
        removed,
        method=search,
        settings=Settings(seed, setup.steps),
        protected=protected,
        pairs=find(setup.model, setup.ids).distillation if method.distil else (),
        students=students,
        folder=setup.folder / f"{method.search}{'-distil' * method.distil}-{removed}-{seed}",
        about=about,
        progress=setup.note,
    )


def prefill_blocks(removed: int) -> int:
    """A third of what decode loses, rounded."""
    return round(removed / 3)


def stages(setup: Setup, name: str, found: StageRemovals) -> StagePair:
    """Both stages with all that the method does for what is left."""
    method, blocks = METHODS[name], setup.shape.num_blocks
    prefill, decode = (getattr(found, stage).solution for stage in STAGES)
    kv = (KVSend(),) * len(decode.route(blocks))
    pair = StagePair(
        setup.model, PDPlan(model=setup.shape, prefill=prefill.actions(blocks), decode=decode.actions(blocks), kv=kv)
    )
    for stage in STAGES:
        if method.distil:
            students, chosen = _students(setup), getattr(found, stage).solution.pairs
            pair = pair.with_changes(stage, {both[0]: students.tensors(both) for both in chosen})
        if method.layer:
            pair = pair.with_changes(stage, _window_layers(setup, pair, stage))
        if method.compensation != "none" and len(pair.plan.layers(stage)) < blocks:
            pair = get_compensation(method.compensation).compensate(pair, stage, setup.ids, setup.note)
        if method.healed and len(pair.plan.layers(stage)) < blocks:
            asked = HealingSection(prefill_steps=setup.training_steps, decode_steps=setup.training_steps)
            pair = heal(pair, stage, setup.ids, asked, setup.note).pair
    return pair


def unified(pair: StagePair) -> StagePair:
    """One model for both stages: decode's."""
    plan = pair.plan
    one = PDPlan(model=plan.model, prefill=plan.decode, decode=plan.decode, kv=plan.kv)
    return replace(pair, plan=one, changed=dict.fromkeys(STAGES, pair.changed.get("decode", {})))


class _CachedSLEB(Greedy):
    def __init__(self) -> None:
        super().__init__(race_z=None)

    def __repr__(self) -> str:
        return "sleb-cached"


def _students(setup: Setup) -> Students:
    return Students(setup.model, setup.ids, StudentsSection())


def _window_layers(setup: Setup, pair: StagePair, stage: Stage) -> dict[int, dict[str, Tensor]]:
    """For each block with removed ones behind it: itself, taught x_i -> x_{i + 1 + removed}; its K and V stay."""
    with tempfile.TemporaryDirectory() as work:
        states = HiddenFiles.record(setup.model, setup.ids, Path(work), note=setup.note)
        asked, taught = StudentsSection(steps=setup.training_steps), dict[int, dict[str, Any]]()
        for block, (stop, after) in zip(pair.plan.layers(stage), pair.spans(stage), strict=True):
            if after > stop:
                lesson = teach(setup.model, block, states[block], states[after], asked, setup.note)
                taught[block] = dict(lesson.layer.state_dict())
        return taught
