"""The recipe's section on one budget for all choices: what is to be reached, and at which load times are counted."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.kv import KVSection
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.section import Section

MEASURED_AT_ONCE = 4  # sequences: prefill's state before every block is kept of so many
_Part = Annotated[float, Field(ge=0, le=1e15)]
_Share = Annotated[float, Field(gt=0, le=1)]


class PrefillTimes(Section):
    """Measured parts of a prefill: of one block its attention, its MLP, and its K and V alone; `rest` of all else."""

    attention: _Part
    mlp: _Part
    kv_only: _Part
    rest: _Part


class DecodeTimes(Section):
    """Measured parts of a decode step: of one block its attention without the reads of KV, its MLP, and those reads."""

    attention: _Part
    mlp: _Part
    kv_read: _Part
    rest: _Part


class TimesSection(Section):
    """A measured cost table, at `isl` and `batch`; any unit, the same within a stage."""

    prefill: PrefillTimes
    decode: DecodeTimes

    @model_validator(mode="after")
    def _takes_time(self) -> TimesSection:
        for stage in (self.prefill, self.decode):
            if stage.attention + stage.mlp <= 0:
                name = "prefill" if stage is self.prefill else "decode"
                raise ValueError(f"{name} has an attention and an MLP of 0; allowed: one above 0, as measured")
        return self


class TargetSection(Section):
    """One budget: the actions of both stages and the rows and dtypes of every layer are chosen together to meet it.

    Attributes:
        itl, ttft: a decode step's and prefill's time, as shares of the unpruned model's, to reach or go below.
        kv: dense over planned bytes of prompt KV to reach.
        loss: perplexity over the unpruned model's, on the KV section's text and before any healing, to stay below.
            Given alone, all three savings are made as large as it allows; with them, they are lowered until it holds.
        isl: prompt tokens at which time and bytes are counted; `kv.prompt_tokens` when left out.
        batch: requests in a decode step, each of which reads its own KV.
        times: measured parts of both stages' times; computed from config.json when left out.
        rounds: how often effects are measured again, about the best plan so far.

    """

    itl: _Share | None = None
    ttft: _Share | None = None
    kv: Annotated[float, Field(ge=1)] | None = None
    loss: Annotated[float, Field(gt=1)] | None = None
    isl: PositiveInt | None = None
    batch: PositiveInt = 1
    times: TimesSection | None = None
    rounds: Annotated[int, Field(ge=0, le=8)] = 2

    @model_validator(mode="after")
    def _something_to_reach(self) -> TargetSection:
        if not self.goals:
            raise ValueError("itl is missing, and so are ttft, kv and loss; allowed: at least one of them")
        return self

    @property
    def goals(self) -> dict[str, float]:
        """What is given of the four."""
        goals = {name: getattr(self, name) for name in ("itl", "ttft", "kv", "loss")}
        return {name: value for name, value in goals.items() if value is not None}

    @property
    def stages(self) -> tuple[bool, bool]:
        """Whether prefill's actions may help, and decode's: those that cannot are not measured."""
        savings = set(self.goals) - {"loss"}
        return "ttft" in savings or not savings, bool(savings & {"itl", "kv"}) or not savings

    def __str__(self) -> str:
        """As in the recipe: `itl 0.8, kv 4.95`."""
        return goals_text(self.goals)


def goals_text(goals: dict[str, float]) -> str:
    """For readers: `itl 0.8, kv 4.95`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in goals.items())


def check_target(target: TargetSection | None, pruning: PruningSection, kv: KVSection, healing: HealingSection) -> None:
    """Raise ValueError where sections of a recipe decide what its target decides, or where nobody decides it."""
    if target is None:
        if kv.method == "budget" and kv.reduction is None and kv.max_loss is None:
            raise ValueError("kv.method is 'budget'; allowed with it: either reduction or max_loss")
        return
    chosen = {f"pruning.{name}": getattr(pruning, name) for name in _COUNTS}
    chosen |= {"healing.kv_only_blocks": healing.kv_only_blocks, "pruning.experts": pruning.experts}
    chosen |= {f"kv.{name}": getattr(kv, name) for name in ("reduction", "max_loss", "longer_prompts")}
    for name, value in chosen.items():
        if value:
            raise ValueError(f"{name} is given but target chooses what is lost; allowed with target: no {name}")
    if pruning.distil or pruning.finalists:
        raise ValueError(
            "pruning has distil or finalists, which target does not take: it makes no students, and compensates "
            "nothing while it chooses; leave them out"
        )
    if kv.method not in ("none", "budget"):
        raise ValueError(f"kv.method is {kv.method!r}; allowed with target: budget, or none where all rows travel")
    if target.kv and target.kv > 1 and kv.method == "none":
        raise ValueError(
            f"target.kv is {target.kv:g} but kv.method is 'none'; allowed with it: budget, whose sparse_choices and "
            "wire_choices are chosen among"
        )


_COUNTS = (
    "prefill_blocks", "decode_blocks", "prefill_attentions", "decode_attentions", "prefill_mlps", "decode_mlps",
)  # fmt: skip
