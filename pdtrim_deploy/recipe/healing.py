"""The recipe's sections on student blocks, compensation and healing of the remaining blocks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pdtrim_deploy.plan import Stage
from pdtrim_deploy.recipe.section import Section
from pdtrim_deploy.recipe.seed import Seed

# Names of a registry that needs torch to import; a test checks that they are equal.
CompensationMethod = Literal["none", "norm", "least-squares"]
TrainingMethod = Literal["full", "lora"]
COMPENSATION_METHODS: tuple[str, ...] = get_args(CompensationMethod)

TOKENS_A_FEATURE = 10
"""Of text, for each unknown of an output that least squares fit: with fewer, other text may lose."""
RANKED = 16
"""Sequences of the text, at most, that choose KV-only blocks: each costs half a run of the pair for each block."""
_TRAINS = ("method", "lora_rank", "regression", "sweep")  # keys that mean nothing without training by gradients
_Minutes = Annotated[float, Field(gt=0)]


class StudentsSection(Section):
    """How the student block of a distilled pair is fitted.

    Its text is that of `healing` without the sequences that finalists are judged on; that of `calibration` if `healing`
    is off.

    Attributes:
        steps: gradient steps for each pair; 0: least squares only, without training.
        minutes: time limit for each pair; a run that it ends is not repeatable to the bit.
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


class HealingSection(Section):
    """Changes to a stage's weights after its blocks are chosen; prefill first, then decode on prefill's KV.

    Text is `sequences` x `length` tokens of the calibration corpus; for decode the first half is the prompt. (With a
    tail prefill's prompts may be longer. For
    `kv_steps` prompts are as long as those that KV is chosen on.)

    Training by gradients distils the dense model's logits, after a share of steps that fit its hidden states.
    The result is used only where a paired test on the last eighth of the text, which no gradient saw, says that it is
    clearly better.

    Attributes:
        kv_only_blocks: blocks of which prefill computes only K and V while decode keeps them, chosen by measured loss
            on 16 sequences at most; with a tail, the last ones. `prefill_steps` then train prefill by what decode
            predicts behind its KV.
        kv_only_tail: the last tokens of each prompt, which run the unchanged model: all blocks, its own weights. On
            prompts much longer than that prefill saves almost as much, and loses less. Prefill's KV-only blocks are
            there twice. What is predicted within its tokens does not count in training, whose prompts are two thirds of
            `length`, or less if the rest is not twice the tail, and half of it at least.
        compensation: without gradients: `norm` rescales (Prune&Comp) each stage whose loss on held-out text falls,
            `least-squares` refits MLP outputs.
        fit: of least squares: `full` refits whole maps, `auto` only with ten tokens of `sequences` (or
            `fit_sequences`) x `length` a feature or more (decode has half of them, and its share of prompts); with
            fewer it changes them by a diagonal and a low rank.
        fit_sequences: of the text, the first so many are what compensation and K and V of KV-only blocks are fitted on;
            all, where it is left out. Training needs more text than a fit, and costs more for each sequence.
        prompt_share: of least squares: what a prompt position counts in decode's fit, of a token that decode serves.
            There decode reads the prompt as a whole model does, which it never does in a pair.
        prefill_steps, decode_steps: steps of training by gradients, at most; 0 is off.
        kv_steps: steps of the same for decode, after KV is chosen, on prompt KV as it will arrive.
        minutes: time limit for each of these three, over all interruptions; a run that it ends is not repeatable to the
            bit.
        method: `full` trains all weights that K and V are not made with, and in KV-only blocks these; `lora` trains
            additions of rank `lora_rank` to the matrices among them, which are merged in the end: less memory (and
            blocks may come and go while it trains), and less is learnt.
        regression: share of the steps, and of the minutes, that fits hidden states, layer by layer; the rest is for
            logits. 0: logits alone.
        learning_rate: multiplied by each factor of `sweep` in a short run (a twentieth of the steps, and of the
            minutes), if that is 5 steps or more; the rate whose run is best on held-out sequences is trained at.
            Otherwise the first factor counts.
        gradient_checkpointing: keep the layers' inputs alone and run each layer again for its gradients: less memory,
            more time, the same weights.
        batch: sequences in a step.

    """

    SHORT: ClassVar[int] = 20
    LEAST_STEPS: ClassVar[int] = 5

    kv_only_blocks: NonNegativeInt = 0
    kv_only_tail: NonNegativeInt = 0
    compensation: CompensationMethod = "none"
    fit: Literal["full", "auto"] = "full"
    fit_sequences: Annotated[int, Field(ge=2)] | None = None
    prompt_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    prefill_steps: NonNegativeInt = 0
    decode_steps: NonNegativeInt = 0
    kv_steps: NonNegativeInt = 0
    minutes: _Minutes | None = None
    method: TrainingMethod = "full"
    lora_rank: PositiveInt = 16
    regression: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    sweep: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1)] = (1.0, 3.0, 10.0)
    gradient_checkpointing: bool = False
    batch: PositiveInt = 4
    sequences: PositiveInt = 64
    length: Annotated[int, Field(ge=16)] = 256
    seed: Seed = 0

    @model_serializer(mode="wrap")
    def _used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump later keys only where they are not the default: older recipes keep their digest."""
        later = (*_TRAINS, "gradient_checkpointing", "fit", "fit_sequences", "prompt_share", "kv_only_tail")
        fields = type(self).model_fields
        return {
            n: value for n, value in serialise(self).items() if n not in later or getattr(self, n) != fields[n].default
        }

    @model_validator(mode="after")
    def _meaningful(self) -> HealingSection:
        trains = self.gradient_steps
        if self.compensation != "least-squares" and (self.fit != "full" or self.prompt_share):
            name = "fit" if self.fit != "full" else "prompt_share"
            raise ValueError(
                f"{name} is {getattr(self, name)} but compensation is {self.compensation}; "
                "allowed with it: least-squares"
            )
        if self.fit_sequences is not None and (problem := self._fit_problem(self.fit_sequences)):
            raise ValueError(f"fit_sequences is {self.fit_sequences} but {problem}")
        if self.minutes is not None and not trains:
            raise ValueError(
                f"minutes is {self.minutes:g} but no steps are asked for; "
                "allowed with minutes: prefill_steps, decode_steps or kv_steps of at least 1"
            )
        chooses = self.compensation != "none" or self.kv_only_blocks or trains
        if chooses and self.sequences < 2:
            raise ValueError("sequences is 1; allowed: at least 2, since some are held out from fitting, to choose on")
        if trains and self.sequences < 4:
            raise ValueError(
                f"sequences is {self.sequences}; allowed with prefill_steps, decode_steps or kv_steps: at least 4, "
                f"since learning rates and the result are judged on sequences that are not trained on"
            )
        return self

    @model_validator(mode="after")
    def _tail_of_kv_only_blocks(self) -> HealingSection:
        if self.kv_only_tail and not self.kv_only_blocks:
            raise ValueError(
                f"kv_only_tail is {self.kv_only_tail} but kv_only_blocks is 0; allowed with it: kv_only_blocks of at "
                "least 1, and no target"
            )
        return self

    def _fit_problem(self, sequences: int) -> str | None:
        if self.compensation == "none" and not self.kv_only_blocks:
            return "nothing is fitted; allowed with it: compensation, or kv_only_blocks of at least 1"
        if sequences > self.sequences:
            return f"sequences is {self.sequences}; allowed: at most as many"
        return None

    @property
    def fitted(self) -> int:
        """Number of sequences, the first of the text, that fits without gradients read."""
        return self.sequences if self.fit_sequences is None else self.fit_sequences

    def judged_from(self, length: int) -> int:
        """The first position behind the prompt of a sequence that counts in training of KV-only prefill.

        Those within a tail do not count, since the unchanged model predicts them; as many do that come behind it.
        """
        return min(self.kv_only_tail, length // 4)

    def trained_prompt(self, length: int) -> int:
        """Tokens of a sequence that are its prompt where KV-only prefill is trained.

        With a tail all but twice that, or but a third of the sequence: the less is left, the less is learnt of a step.
        """
        return length - max(2 * self.judged_from(length), length // 3) if self.kv_only_tail else length // 2

    def decides(self, *, trains: bool) -> dict[str, Any]:
        """What weights depend on, as JSON; where gradients make them, with the values of training, defaults too."""
        left_out = (*_TRAINS, "gradient_checkpointing")
        kept = {name: value for name, value in self.model_dump(mode="json").items() if name not in left_out}
        return kept | ({name: getattr(self, name) for name in _TRAINS} if trains else {})

    @property
    def judged(self) -> int:
        """Number of sequences at the end of the text that finalists are judged on; students learn from the others."""
        return self.sequences - self.sequences // 2

    def taught(self, finalists: int) -> int:
        """Number of sequences that students learn from, with so many finalists."""
        return self.sequences - (self.judged if finalists else 0)

    def tries(self, steps: int) -> bool:
        """Whether learning rates are tried before so many steps."""
        return len(self.sweep) > 1 and steps // self.SHORT >= self.LEAST_STEPS

    def steps_of(self, stage: Stage, *, behind_kv: bool = False) -> int:
        """Steps of a stage, or those of decode on prompt KV as it will arrive."""
        if behind_kv:
            return self.kv_steps
        return self.prefill_steps if stage == "prefill" else self.decode_steps

    @property
    def gradient_steps(self) -> int:
        """Steps of all training by gradients."""
        return self.prefill_steps + self.decode_steps + self.kv_steps

    @property
    def trains(self) -> bool:
        """Whether training by gradients runs before KV is chosen."""
        return bool(self.prefill_steps or self.decode_steps)

    @property
    def enabled(self) -> bool:
        """Whether any healing runs before KV is chosen."""
        return self.compensation != "none" or self.trains or bool(self.kv_only_blocks)
