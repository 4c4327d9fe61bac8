"""Healing of one stage: train what is left of it to predict what the dense model does, and keep that if it helps.

Prefill is healed as a whole model, or, where some of its blocks run for their KV alone, by what decode predicts behind
its KV. Decode is healed as it serves: on what follows a prompt whose KV the pruned (and healed) prefill made; whole KV,
or as a plan sends it, once there is one. What K and V are made with is frozen in both stages, but in blocks that run
for their KV alone, so the one's KV stays the other's; so are embeddings, final norm and LM head, which both share with
the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.allocator import trim
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.mapped import mapped
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.healing.learnt import learnt, trained_model
from pdtrim_deploy.pruning.healing.losses import HiddenLoss, LogitLoss
from pdtrim_deploy.pruning.healing.pair_reader import PairReader
from pdtrim_deploy.pruning.healing.paired import PairedTest, Split
from pdtrim_deploy.pruning.healing.reader import Reader
from pdtrim_deploy.pruning.healing.stage_reader import PrefillKV, PromptKV, StageReader
from pdtrim_deploy.pruning.healing.state import StateFile
from pdtrim_deploy.pruning.healing.training import Trainer
from pdtrim_deploy.pruning.healing.weights import FullWeights, LoraWeights, Weights
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.recipe.healing import HealingSection


@dataclass(frozen=True)
class Healed:
    """Where `test` does not keep the healed weights, `pair` is as it was. `training`: what was done, as JSON."""

    pair: StagePair
    test: PairedTest
    training: dict[str, Any]

    @property
    def kept(self) -> bool:
        """Whether the healed weights are used."""
        return self.test.kept

    @property
    def steps(self) -> int:
        """Of the long run, over its phases."""
        return sum(phase["steps"] for phase in self.training["phases"])

    @property
    def report(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {"steps": self.steps} | self.test.report | self.training


def heal(
    pair: StagePair,
    stage: Stage,
    ids: Tensor,
    section: HealingSection,
    note: Callable[[str], None] = lambda _: None,
    prompt_kv: PromptKV | None = None,
    file: StateFile | None = None,
    clock: Callable[[], float] = monotonic,
    folder: Path | None = None,
    scratch: Path | None = None,
) -> Healed:
    """`pair` with `stage` trained on text `ids`, int64 `[S, T]`: all steps asked for, or until time is up.

    With a `prompt_kv` these are `kv_steps` of decode; without, prompts are T / 2 long and their KV is whole.
    What `file` has of the same training is not done again; `clock` gives the seconds that `minutes` limits.

    With a `folder` the memory is bounded: what additions of low rank are merged into lies in mapped files there, and
    layers are run again for their gradients, so of a streamed model no more than two blocks are there at a time beside
    those that it may keep. In `scratch` lie states of text that training of KV-only prefill reads more than once.

    Raises:
        UserError: peft is wanted and not installed; a loss that is not a number; a full disk.

    """
    steps = section.steps_of(stage, behind_kv=prompt_kv is not None)
    if stage == "decode" and prompt_kv is None:
        prompt_kv = PromptKV(ids.shape[1] // 2, PrefillKV(pair))
    text = Split.of(ids, chooses=section.tries(steps) or section.regression > 0)
    note(f"healing {stage}: KL from the dense model on {len(text.judged)} held-out sequences")
    before = _reader(pair, stage, ids, section, prompt_kv).divergences(text.judged, section.batch)
    model, layers = trained_model(pair, stage), pair.plan.layers(stage)
    names = learnt(pair, stage, model)
    weights: Weights = (
        LoraWeights(model, layers, names, section.lora_rank, section.seed, _keep_in(folder))
        if section.method == "lora"
        else FullWeights(model, layers, names)
    )
    recomputes = section.gradient_checkpointing or folder is not None
    if steps * section.batch <= len(text.fit):
        scratch = None  # no sequence comes twice
    reader = _reader(pair, stage, ids, section, prompt_kv, model, recomputes, scratch)
    learns = [bool(of_layer) and pair.adds(stage, block) for of_layer, block in zip(names, layers, strict=True)]
    if not any(learns):  # K and V alone, which change no hidden state: all steps are for logits
        section = section.model_copy(update={"regression": 0.0})
    losses = HiddenLoss(StageReader(pair, stage, model, prompt_kv, recomputes), learns), LogitLoss(reader)
    trainer = Trainer(stage, weights, reader, losses, text, steps, section, file or StateFile(), note, clock)
    training = trainer.train()
    healed = pair.with_changes(stage, weights.tensors())
    after = _reader(healed, stage, ids, section, prompt_kv).divergences(text.judged, section.batch)
    test = PairedTest.of(before, after)
    note(
        f"healing {stage}: KL from the dense model {test.before:.4f} -> {test.after:.4f} nats, difference "
        f"{test.difference:+.4f} ± {test.stderr:.4f}" + ("" if test.kept else ": not clearly better, not kept")
    )
    return Healed(healed if test.kept else pair, test, training)


def _keep_in(folder: Path | None) -> Callable[[Tensor], Tensor]:
    def keep(merged: Tensor) -> Tensor:
        trim()  # of earlier ones
        try:
            return mapped(merged, folder)
        except OSError as error:
            raise UserError(
                f"no room for healed weights in {folder} ({error.strerror}); free some space and run the same command "
                "again: training goes on where it was"
            ) from error

    return keep if folder is not None else lambda merged: merged


def _reader(
    pair: StagePair,
    stage: Stage,
    ids: Tensor,
    section: HealingSection,
    prompt_kv: PromptKV | None,
    model: CausalLM | None = None,
    recomputes: bool = False,
    scratch: Path | None = None,
) -> Reader:
    """Of `model`, by default the stage as `pair` has it: with the weights that would be written."""
    model = model or trained_model(pair, stage)
    if stage == "prefill" and pair.plan.kv_only_layers:
        length = ids.shape[1]
        learns = 0 if pair.plan.kv_only_tail else 1  # of the layers that both stages share, the last
        shared = max(0, pair.shared_layers - learns)
        prompt, judged_from = section.trained_prompt(length), section.judged_from(length)
        return PairReader(pair, model, prompt, recomputes, judged_from, shared, scratch)
    return StageReader(pair, stage, model, prompt_kv, recomputes)
