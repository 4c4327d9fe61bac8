"""The recipe's section on pruning: blocks, and experts of the blocks that stay."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pdtrim_deploy.recipe.experts import ExpertsSection
from pdtrim_deploy.recipe.pruning_methods import METHODS, ONE_SHOT
from pdtrim_deploy.recipe.section import Section
from pdtrim_deploy.recipe.seed import Seed

_SUBLAYERS = ("prefill_attentions", "decode_attentions", "prefill_mlps", "decode_mlps")
_ANY = ("method", "prefill_blocks", "decode_blocks", "distil", "threshold", "blocks_in_memory", "experts")


def _registered(name: str) -> str:
    if name not in METHODS:
        raise PydanticCustomError("unknown_method", "no such pruning method")
    return name


class PruningSection(Section):
    """How many blocks each stage loses (decode loses all that prefill loses), and the method that chooses them.

    Attributes:
        prefill_attentions, decode_attentions: of so many other blocks each stage runs the MLP alone; prompt KV of those
            of decode does not travel. prefill_mlps, decode_mlps: of so many the attention alone. Decode loses all that
            prefill loses here too.
        objective: what `greedy` and `anneal` keep low, and finalists are judged by, on calibration text: `loss`, of the
            text's own next tokens, or `kl`, from the dense model's predictions to the pruned model's.
        distil: let annealing replace an adjacent pair by one student block, where that costs less.
        threshold: cosine above which a pair is in the distillation set; annealing may move such a pair by one block.
        racing: let candidates leave the search early, by part of the text and of the vocabulary; false measures each
            candidate of greedy, and each step of annealing, on all of both.
        steps, minutes: limits of annealing in each search; time counts from the search's first step, but never cuts
            short the greedy start or the judging of finalists. A run that time ends is not repeatable to the bit.
        seed: for `anneal`.
        finalists: number of solutions (the search's result, the greedy start, the cheapest run of adjacent blocks, the
            best others that annealing accepted) that are compensated and judged again; 0: take the search's result.
        baselines: methods that search by no loss, whose choices are compensated and judged beside the finalists, so
            that the result is no worse than any of theirs in the judge's eyes.
        memory_mb: limit of hidden states in memory while `anneal` or `greedy` searches; disk_mb: limit of further ones
            in mapped files in the bundle.
        blocks_in_memory: blocks whose weights are in memory at a time; others are read from the checkpoint when they
            run. The result is the same. All blocks when left out. The whole model is still held by `healing.method:
            full`, LoRA of stacked experts, and the builders of engines, but those of large graphs for onnxruntime;
            `calibration.continuations` are refused with it.
        experts: experts that the remaining blocks keep; all when left out.

    """

    method: Annotated[str, AfterValidator(_registered), Field(json_schema_extra={"enum": [*METHODS]})] = "greedy"
    objective: Literal["loss", "kl"] = "loss"
    prefill_blocks: NonNegativeInt = 0
    decode_blocks: NonNegativeInt = 0
    prefill_attentions: NonNegativeInt = 0
    decode_attentions: NonNegativeInt = 0
    prefill_mlps: NonNegativeInt = 0
    decode_mlps: NonNegativeInt = 0
    distil: bool = False
    threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.95
    racing: bool = True
    steps: NonNegativeInt = 150
    minutes: Annotated[float, Field(gt=0)] | None = None
    seed: Seed = 0
    finalists: NonNegativeInt = 0
    baselines: Annotated[tuple[str, ...], Field(strict=False)] = ()
    memory_mb: PositiveInt = 1024
    disk_mb: NonNegativeInt = 0
    blocks_in_memory: PositiveInt | None = None
    experts: ExpertsSection | None = None

    @model_serializer(mode="wrap")
    def _used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump later keys only where they are not the default: older recipes keep their digest."""
        defaults = {"objective": "loss", "racing": True, "experts": None, "baselines": ()}
        defaults |= dict.fromkeys(_SUBLAYERS, 0)
        return {
            n: value for n, value in serialise(self).items() if n not in defaults or getattr(self, n) != defaults[n]
        }

    @model_validator(mode="after")
    def _nested(self) -> PruningSection:
        if self.prefill_blocks > self.decode_blocks:
            raise ValueError(
                f"prefill_blocks is {self.prefill_blocks} but decode_blocks is {self.decode_blocks}; "
                f"allowed: prefill_blocks of at most decode_blocks, since decode drops every block that prefill drops"
            )
        for sublayer in ("attentions", "mlps"):
            before, after = (getattr(self, f"{stage}_{sublayer}") for stage in ("prefill", "decode"))
            if before > after:
                raise ValueError(
                    f"prefill_{sublayer} is {before} but decode_{sublayer} is {after}; allowed: prefill_{sublayer} of "
                    f"at most decode_{sublayer}, since decode goes without every sublayer that prefill goes without"
                )
        if self.decode_mlps and self.experts is not None:
            raise ValueError(
                f"decode_mlps is {self.decode_mlps} but experts is given; allowed with experts: decode_mlps 0, since "
                "config.json has one number of experts for all blocks, and ranking needs each to run"
            )
        if self.distil and self.method != "anneal":
            raise ValueError(f"distil is true but method is {self.method}; allowed: distil with method anneal")
        for name, field in type(self).model_fields.items():
            options = METHODS[self.method].options
            if name not in (*_ANY, *options) and getattr(self, name) != field.default:
                known = ", ".join((*_ANY[1:], *options))
                raise ValueError(f"method is {self.method}, which takes no {name}; allowed with it: {known}")
        return self

    @model_validator(mode="after")
    def _baselines_fit(self) -> PruningSection:
        if not self.baselines:
            return self
        if unknown := [name for name in self.baselines if name not in ONE_SHOT]:
            raise ValueError(f"baselines names {unknown[0]!r}; allowed: {', '.join(ONE_SHOT)}")
        if len({*self.baselines}) < len(self.baselines):
            raise ValueError(f"baselines is {list(self.baselines)}; allowed: each of {', '.join(ONE_SHOT)} once")
        if not self.finalists:
            raise ValueError("baselines is given but finalists is 0; allowed with it: at least 1, to be judged beside")
        if self.decode_sublayers:
            raise ValueError("baselines is given but sublayers are to go; allowed with it: whole blocks alone")
        return self

    @property
    def judged(self) -> int:
        """Solutions of each search that are compensated and judged, at most."""
        return self.finalists + len(self.baselines)

    @property
    def prefill_sublayers(self) -> int:
        """Attentions and MLPs that prefill goes without."""
        return self.prefill_attentions + self.prefill_mlps

    @property
    def decode_sublayers(self) -> int:
        """Attentions and MLPs that decode goes without."""
        return self.decode_attentions + self.decode_mlps

    @property
    def decode_loses(self) -> int:
        """Blocks and sublayers that decode goes without; where none, nothing is pruned."""
        return self.decode_blocks + self.decode_sublayers

    @property
    def prefill_loses(self) -> int:
        """Blocks and sublayers that prefill goes without."""
        return self.prefill_blocks + self.prefill_sublayers

    @property
    def searches(self) -> tuple[bool, bool]:
        """Whether something is chosen for prefill, and more than that for decode."""
        return bool(self.prefill_loses), self.decode_loses > self.prefill_loses
