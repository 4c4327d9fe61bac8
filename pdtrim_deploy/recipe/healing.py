"""The recipe's sections on what is done for the blocks that are left: student blocks, compensation, healing."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from pdtrim_deploy.recipe.seed import Seed

# Names of a registry that needs torch to import; a test holds them equal.
CompensationMethod = Literal["none", "norm", "least-squares"]
COMPENSATION_METHODS: tuple[str, ...] = get_args(CompensationMethod)

_Minutes = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StudentsSection(_Section):
    """How the student block of a distilled pair is made.

    Its text is that of `healing`, where that section asks for anything, but what finalists are judged on; else that of
    `calibration`.

    Attributes:
        steps: of gradient descent for each pair; 0 leaves what least squares gives, which is training-free.
        minutes: at most so long for each pair; a run that time ends is not repeatable to the bit.
        batch: sequences in a step.

    """

    steps: NonNegativeInt = 0
    minutes: _Minutes | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    batch: PositiveInt = 4
    seed: Seed = 0

    @model_validator(mode="after")
    def _meaningful(self) -> StudentsSection:
        if self.minutes is not None and not self.steps:
            raise ValueError(f"minutes is {self.minutes:g} but steps is 0; allowed with minutes: steps of at least 1")
        return self


class HealingSection(_Section):
    """What is done to a stage's weights once its blocks are chosen; prefill first, then decode behind it.

    Text is `sequences` x `length` tokens of the calibration corpus; for decode the first half is the prompt. (For
    `kv_steps` prompts are as long as those that KV is chosen on.)

    Attributes:
        kv_only_blocks: blocks that decode keeps and prefill runs for their K and V alone, chosen by measured loss.
        compensation: without gradients: `norm` rescales (Prune&Comp) each stage that it helps on text not fitted,
            `least-squares` refits MLP outputs.
        prefill_steps, decode_steps: of logit distillation from the dense model; 0 is off.
        kv_steps: of the same for decode once more, when KV is chosen: behind prompt KV as it will arrive.
        minutes: at most so long for each of these three; a run that time ends is not repeatable to the bit.
        batch: sequences in a step.

    """

    kv_only_blocks: NonNegativeInt = 0
    compensation: CompensationMethod = "none"
    prefill_steps: NonNegativeInt = 0
    decode_steps: NonNegativeInt = 0
    kv_steps: NonNegativeInt = 0
    minutes: _Minutes | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch: PositiveInt = 4
    sequences: PositiveInt = 64
    length: Annotated[int, Field(ge=16)] = 256
    seed: Seed = 0

    @model_validator(mode="after")
    def _meaningful(self) -> HealingSection:
        trains = self.prefill_steps or self.decode_steps or self.kv_steps
        if self.minutes is not None and not trains:
            raise ValueError(
                f"minutes is {self.minutes:g} but no steps are asked for; "
                "allowed with minutes: prefill_steps, decode_steps or kv_steps of at least 1"
            )
        chooses = self.compensation != "none" or self.kv_only_blocks or trains
        if chooses and self.sequences < 2:
            raise ValueError("sequences is 1; allowed: at least 2, since some are kept from fitting, to choose on")
        return self

    @property
    def judged(self) -> int:
        """Sequences of the text, its last ones, that finalists are judged on; students learn from those before."""
        return self.sequences - self.sequences // 2

    def taught(self, finalists: int) -> int:
        """Sequences of the text that students learn from, where so many finalists are judged."""
        return self.sequences - (self.judged if finalists else 0)

    @property
    def trains(self) -> bool:
        """Whether gradients are taken, or K and V fitted, before KV is chosen: with the whole model in memory."""
        return bool(self.kv_only_blocks or self.prefill_steps or self.decode_steps)

    @property
    def asked(self) -> bool:
        """Whether anything is to be done before KV is chosen."""
        return self.compensation != "none" or self.trains
