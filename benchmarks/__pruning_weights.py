"""Weights of what is left in benchmarks/pruning.py: students, compensation, healing, or LLM-Streamline's layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from __pruning_choice import JUDGED, Choice, Setup
from __pruning_methods import Method

from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Stage
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.healing import heal
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.students.regression import teach
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.recipe.healing import HealingSection, StudentsSection


def stages(setup: Setup, method: Method, choice: Choice, place: Path) -> tuple[StagePair, float]:
    """Both stages with all that the method does for what is left, and the seconds of it.

    Weights once made stay in `place`, by plan, with the seconds they took: no row looks cheaper for coming second.
    """
    blocks, prefill, decode = setup.shape.num_blocks, choice.prefill, choice.decode
    kv = (KVSend(),) * len(decode.route(blocks))
    pair = StagePair(
        setup.model, PDPlan(model=setup.shape, prefill=prefill.actions(blocks), decode=decode.actions(blocks), kv=kv)
    )
    taught = f"-{len(setup.text[:-JUDGED])}" if prefill.pairs or decode.pairs else ""
    place = place / f"{pair.plan.digest[:12]}{taught}"
    place.mkdir(parents=True, exist_ok=True)
    healed, seconds = "", 0.0  # decode's weights depend on prefill's
    for stage in STAGES:
        for both in getattr(choice, stage).pairs:
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
            section = HealingSection(prefill_steps=setup.training_steps, decode_steps=setup.training_steps)
            file, healed = place / f"{stage}-healed", "-healed"
            pair, took = _kept(file, pair, stage, lambda p, s=stage, section=section: _healed(setup, p, s, section))
            seconds += took
    return pair, seconds


def _healed(setup: Setup, pair: StagePair, stage: Stage, section: HealingSection) -> StagePair:
    return heal(pair, stage, setup.text, section, setup.note).pair


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
    unified_plan = PDPlan(model=plan.model, prefill=plan.decode, decode=plan.decode, kv=plan.kv)
    return replace(pair, plan=unified_plan, changed=dict.fromkeys(STAGES, pair.changed.get("decode", {})))


def _with_layers(setup: Setup, pair: StagePair, stage: Stage) -> StagePair:
    """For each block with removed ones behind it: itself, taught x_i -> x_{i + 1 + removed}; its K and V stay.

    A step runs one layer forwards and backwards, which counts three; one of healing all that are left, so, and the
    teacher. So many more steps does the layer get.
    """
    left, blocks = len(pair.plan.layers(stage)), setup.shape.num_blocks
    section = StudentsSection(steps=setup.training_steps * (3 * left + blocks) // 3)
    with tempfile.TemporaryDirectory() as work:
        states = HiddenFiles.record(setup.model, setup.text, Path(work), note=setup.note)
        taught = dict[int, dict[str, Any]]()
        for block, (stop, after) in zip(pair.plan.layers(stage), pair.spans(stage), strict=True):
            if after > stop:
                lesson = teach(setup.model, block, states[block], states[after], section)
                setup.note(f"{stage} block {block} for {stop} to {after - 1}: {lesson.error_fit} -> {lesson.error}")
                taught[block] = dict(lesson.layer.state_dict())
        return pair.with_changes(stage, taught)
