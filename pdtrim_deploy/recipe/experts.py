"""The recipe's section on expert pruning: how many experts each stage keeps, and the criterion that ranks them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pdtrim_deploy.recipe.section import Section
from pdtrim_deploy.recipe.seed import Seed

# Names of a registry that needs torch to import; a test checks that they are equal.
ExpertCriterion = Literal["reap", "frequency", "random"]
EXPERT_CRITERIA: tuple[str, ...] = get_args(ExpertCriterion)

_Keep = Annotated[float, Field(gt=0)]


class ExpertsSection(Section):
    """Experts that each block of a mixture of experts keeps, by stage.

    They are ranked on the text of `calibration`: for prefill on the prompts; for decode on what follows them, read with
    the prompts' KV as prefill hands it over.

    Attributes:
        prefill, decode: experts that the stage's blocks keep: a whole number, or a share below 1; all when left out.
        method: what ranks them: `reap` (mean over its tokens of router weight x norm of the expert's output),
            `frequency` (number of its tokens), `random` (baseline).
        shared: both stages keep one set, ranked on the tokens of both (baseline).
        seed: for `random`.

    """

    prefill: _Keep | None = None
    decode: _Keep | None = None
    method: ExpertCriterion = "reap"
    shared: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _meaningful(self) -> ExpertsSection:
        if self.prefill is None and self.decode is None:
            raise ValueError("prefill and decode are left out; allowed: one of them, or no experts section")
        for stage in ("prefill", "decode"):
            keep = getattr(self, stage)
            if keep is not None and keep >= 1 and keep != int(keep):
                raise ValueError(f"{stage} is {keep:g}; allowed: a whole number of experts, or a share below 1")
        if self.shared and self.prefill != self.decode:
            raise ValueError(
                f"shared is true but prefill is {_text(self.prefill)} and decode is {_text(self.decode)}; allowed with "
                "it: the same number for both"
            )
        if self.seed and self.method != "random":
            raise ValueError(f"method is {self.method}, which takes no seed; allowed with seed: random")
        return self

    def count(self, stage: str, experts: int) -> int:
        """How many of a block's `experts` the stage keeps; a share is rounded to the nearest number."""
        keep = self.prefill if stage == "prefill" else self.decode
        if keep is None:
            return experts
        return round(keep * experts) if keep < 1 else int(keep)


def _text(keep: float | None) -> str:
    return "left out" if keep is None else f"{keep:g}"
