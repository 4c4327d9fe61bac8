"""What benchmarks/pruning.py compares: which search chooses, and what is done for the blocks that are left."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.cache import Cache
from pdtrim_deploy.checkpoints.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.plan import STAGES, KVSend, ModelShape, PDPlan, Stage
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.cost import judged_forwards
from pdtrim_deploy.pruning.healing import heal
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.refitted import Refitted
from pdtrim_deploy.pruning.search import Search, Settings
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.stages import StageRemovals, choose_stages
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.pruning.students.regression import teach
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.pruning.verdicts import WrittenDown
from pdtrim_deploy.recipe_healing import HealingSection, StudentsSection

Note = Callable[[str], None]
JUDGED = 32  # sequences, the last of the text, that finalists are judged on; students learn from those before


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        search: registered, or `sleb-cached`: SLEB with hidden states kept in front of every block, no racing.
        published: count the block-forwards of a search that keeps nothing: by the formula of `pruning/cost.py`, which a
            test holds exact; its answer is the cached one's.
        seeded: whether seeds change it.
        finalists: judged again with that compensation, which decides.
        trained: whether gradients are taken; the others are compared among themselves.
        layer: LLM-Streamline's: the block in front of each removed window is taught to stand for both.

    """

    search: str
    seeded: bool = False
    distil: bool = False
    compensation: str = "none"
    finalists: int = 0
    healed: bool = False
    layer: bool = False
    published: bool = False

    @property
    def trained(self) -> bool:
        """Whether it takes gradient steps."""
        return self.healed or self.layer

    @property
    def treatment(self) -> tuple[str, bool, bool]:
        """What is done for the blocks that are left: with the plan, all that a row's quality depends on."""
        return self.compensation, self.healed, self.layer


_OURS = Method("anneal", seeded=True, distil=True, compensation="least-squares", finalists=4)
METHODS = {
    "random": Method("random", seeded=True),
    "ShortGPT": Method("cosine"),
    "Shortened LLaMA": Method("perplexity"),
    "LLM-Streamline, no layer": Method("streamline"),
    "ShortGPT, refitted": Method("cosine", compensation="least-squares"),
    "LLM-Streamline, no layer, refitted": Method("streamline", compensation="least-squares"),
    "SLEB, cached": Method("sleb-cached"),
    "SLEB": Method("sleb-cached", published=True),
    "ours": _OURS,
    # each without one thing
    "ours, no D": replace(_OURS, distil=False),
    "ours, no annealing": Method("greedy", compensation="least-squares", finalists=2),
    "ours, no finalists": replace(_OURS, finalists=0),
    "ours, no compensation": replace(_OURS, compensation="none", finalists=0),
    "ours, greedy": Method("greedy"),  # without any of the three
    "ours, greedy, rescaled": Method("greedy", compensation="norm"),  # Prune&Comp in the place of the refit
    "LLM-Streamline": Method("streamline", layer=True),
    "ours, healed": replace(_OURS, healed=True),
    "ours, no annealing, healed": Method("greedy", compensation="least-squares", finalists=2, healed=True),
}


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

    def judging(self, found: StageRemovals) -> int:
        """Block-forwards of having the last word on finalists, at most."""
        lost = [getattr(found, stage).solution.saved for stage in STAGES]
        counts = [len(found.finalists.get(stage, ())) for stage in STAGES]
        size, texts = (self.shape.num_blocks, *lost), len(self.text[-JUDGED:])
        again = judged_forwards(*size, texts, 0, len(found.passed_over))
        return judged_forwards(*size, texts, *counts) + again

    def place(self, name: str, removed: int, seed: int) -> Path:
        """The search's own folder; methods that share their search share it."""
        method = METHODS[name]
        steps = f"-{self.steps}" if method.search == "anneal" else ""
        return self.folder / f"{method.search}{'-distil' * method.distil}{steps}-{removed}-{seed}"


def choose(setup: Setup, name: str, removed: int, seed: int) -> StageRemovals:
    """Prefill loses a third as many. What a search wrote down stays in the folder: a stopped one goes on."""
    method = METHODS[name]
    search: str | Search = method.search
    if search == "sleb-cached":
        search = _CachedSLEB()
    about: object = setup.shape.fingerprint
    if method.distil:
        about = [about, len(setup.text[:-JUDGED])]  # what students learned from
    protected = frozenset[int]()
    if method.search == "sleb-cached":
        protected = frozenset({0, setup.shape.num_blocks - 1})  # as SLEB has it
    return choose_stages(
        setup.model,
        setup.ids,
        prefill_blocks(removed),
        removed,
        method=search,
        settings=Settings(seed, setup.steps if method.search == "anneal" else 0),
        protected=protected,
        pairs=setup.pairs if method.distil else (),
        students=setup.students if method.distil else None,
        folder=setup.place(name, removed, seed),
        about=about,
        judge=_judge(setup, method) if method.finalists else None,
        finalists=method.finalists,
        progress=setup.note,
    )


def _judge(setup: Setup, method: Method) -> WrittenDown:
    """Says the same of finalists that another seed or method has asked for."""
    students, text = setup.students if method.distil else None, setup.text[-JUDGED:]
    judge = Refitted(setup.model, setup.shape, text, method.compensation, students, setup.note)
    about = [setup.shape.fingerprint, method.compensation, len(setup.text), len(text)]
    return WrittenDown(judge, setup.folder / f"judged-{method.compensation}-{len(setup.text)}.jsonl", about)


def prefill_blocks(removed: int) -> int:
    """A third of what decode loses, rounded."""
    return round(removed / 3)


def stages(setup: Setup, name: str, found: StageRemovals, place: Path) -> tuple[StagePair, float]:
    """Both stages with all that the method does for what is left, and the seconds of it.

    Weights once made stay in `place`, by plan, with the seconds they took: no row looks cheaper for coming second.
    """
    method, blocks = METHODS[name], setup.shape.num_blocks
    prefill, decode = (getattr(found, stage).solution for stage in STAGES)
    kv = (KVSend(),) * len(decode.route(blocks))
    pair = StagePair(
        setup.model, PDPlan(model=setup.shape, prefill=prefill.actions(blocks), decode=decode.actions(blocks), kv=kv)
    )
    taught = f"-{len(setup.text[:-JUDGED])}" if prefill.pairs or decode.pairs else ""
    place = place / f"{pair.plan.digest[:12]}{taught}"
    place.mkdir(parents=True, exist_ok=True)
    healed, seconds = "", 0.0  # decode's weights depend on prefill's
    for stage in STAGES:
        for both in getattr(found, stage).solution.pairs:
            pair = pair.with_changes(stage, {both[0]: setup.students.tensors(both)})
        if len(pair.plan.layers(stage)) == blocks:
            continue
        if method.layer:
            pair, took = _kept(place / f"{stage}-layer", pair, stage, lambda p, s=stage: _with_layers(setup, p, s))
            seconds += took
        if method.compensation != "none":
            mend = get_compensation(method.compensation).compensate
            file = place / f"{stage}-{method.compensation}{healed}"
            pair, took = _kept(file, pair, stage, lambda p, s=stage, mend=mend: mend(p, s, setup.text, setup.note))
            seconds += took
        if method.healed:
            asked = HealingSection(prefill_steps=setup.training_steps, decode_steps=setup.training_steps)
            file, healed = place / f"{stage}-healed", "-healed"
            pair, took = _kept(file, pair, stage, lambda p, s=stage, asked=asked: _healed(setup, p, s, asked))
            seconds += took
    return pair, seconds


def _healed(setup: Setup, pair: StagePair, stage: Stage, asked: HealingSection) -> StagePair:
    return heal(pair, stage, setup.text, asked, setup.note).pair


def _kept(
    file: Path, pair: StagePair, stage: Stage, change: Callable[[StagePair], StagePair]
) -> tuple[StagePair, float]:
    """`change(pair)` and its seconds, or what they came to in an earlier run: a stopped benchmark goes on behind it."""
    seconds = file.with_suffix(".seconds")  # written last: weights without it are made again
    if not seconds.exists():
        began = time.monotonic()
        save_blocks(change(pair).changed.get(stage, {}), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        seconds.write_text(str(time.monotonic() - began))
    return pair.with_changes(stage, read_blocks(file)), float(seconds.read_text())


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


def _with_layers(setup: Setup, pair: StagePair, stage: Stage) -> StagePair:
    """For each block with removed ones behind it: itself, taught x_i -> x_{i + 1 + removed}; its K and V stay.

    A step runs one layer forwards and backwards, which counts three; one of healing all that are left, so, and the
    teacher. So many more steps does the layer get.
    """
    left, blocks = len(pair.plan.layers(stage)), setup.shape.num_blocks
    asked = StudentsSection(steps=setup.training_steps * (3 * left + blocks) // 3)
    with tempfile.TemporaryDirectory() as work:
        states = HiddenFiles.record(setup.model, setup.text, Path(work), note=setup.note)
        taught = dict[int, dict[str, Any]]()
        for block, (stop, after) in zip(pair.plan.layers(stage), pair.spans(stage), strict=True):
            if after > stop:
                lesson = teach(setup.model, block, states[block], states[after], asked)
                setup.note(f"{stage} block {block} for {stop} to {after - 1}: {lesson.error_fit} -> {lesson.error}")
                taught[block] = dict(lesson.layer.state_dict())
        return pair.with_changes(stage, taught)
