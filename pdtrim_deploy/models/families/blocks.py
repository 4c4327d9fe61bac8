"""What a family file may say of blocks: their tensors, their experts, and what recipes may not ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdtrim_deploy.models.families.sizes import axis_terms

EXPERT = "{expert}"
EXPERTS = "experts"  # the size that is the number of experts
Axes = tuple[str, ...]
Tensors = dict[str, Axes]
"""Tensors by their name within a block (`{expert}` stands for an expert's number), with the sizes of their axes."""

Feature = Literal[
    "norm",
    "least-squares",
    "distil",
    "training",
    "kv_only_blocks",
    "sublayers",
    "blocks_in_memory",
    "engines",
]
_SIZES = ("q", "kv", "head", "hidden", "intermediate", "vocab")


class FamilyData(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Experts(FamilyData):
    """The MLPs of blocks that have several.

    Attributes:
        count: key of config.json, or several (`a|b`): experts of a block.
        tensors: on disk, in the place of the block's `mlp`.
        stacked: by transformers' name of a parameter: what it stacks on disk, along a new first axis by expert; where
            two are given, an expert's are put one behind the other. A tensor of all experts is its own.
        dense_blocks: key of config.json: so many first blocks have the `mlp` instead. None: no block has.
        top_k: key of config.json: experts that a token is sent to.
        groups, top_groups: keys of config.json: equal parts that the router first chooses among, and how many of these
            a token may reach. None: it has no groups.
        needs: keys of config.json and the one value that they may have; others give blocks that SGLang reads otherwise.

    """

    count: str
    tensors: Tensors
    stacked: dict[str, tuple[str, ...]]
    dense_blocks: str | None = None
    top_k: str = "num_experts_per_tok"
    groups: str | None = None
    top_groups: str | None = None
    needs: dict[str, Any] = Field(default_factory=dict)


class Blocks(FamilyData):
    """Tensor names on disk and their roles: what opens pruning and healing.

    Attributes:
        common: tensors of every block.
        mlp: of blocks with one MLP.
        experts: of blocks with several; None: the family has none.
        where: tensors that are there where a key of config.json is true.
        sizes: further names for sizes, each of a key of config.json.
        renamed: parts of names on disk and what transformers has in their place.
        cut_lists: keys of config.json that hold one value a block, beside `layer_types`.
        stage_config: keys that a stage's config.json has another value of.
        exact: ends of names of tensors that keep the dtype they have, whatever the stage's.
        computes: keys of config.json that change what the weights compute, beside those that all families share.
        needs: keys of config.json and the one value that they may have: with others there is more between or behind the
            blocks than we run.
        served_windows: SGLang lets windowed layers attend to all tokens, so that a worker serves no longer texts.
        refused: what recipes may ask of other families, and why it would be wrong here.

    """

    common: Tensors
    mlp: Tensors = Field(default_factory=dict)
    experts: Experts | None = None
    where: dict[str, Tensors] = Field(default_factory=dict)
    sizes: dict[str, str] = Field(default_factory=dict)
    renamed: dict[str, str] = Field(default_factory=dict)
    cut_lists: tuple[str, ...] = ()
    stage_config: dict[str, Any] = Field(default_factory=dict)
    exact: tuple[str, ...] = ()
    computes: tuple[str, ...] = ()
    needs: dict[str, Any] = Field(default_factory=dict)
    served_windows: bool = False
    refused: dict[Feature, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes_are_known(self) -> Blocks:
        expert = self.experts.tensors if self.experts else {}
        for name, axes in (self.common | self.mlp | expert | joined(self.where.values())).items():
            for factor in (factor for axis in axes for term in axis_terms(axis) for factor in term):
                if not factor.isdecimal() and factor not in (*_SIZES, *self.sizes):
                    raise ValueError(f"{name}: size {factor} is unknown; use {', '.join((*_SIZES, *self.sizes))}")
        for name, axes in expert.items():
            if EXPERTS in axes[1:]:
                raise ValueError(f"{name}: its axis by expert must be the first")
        parts = {part for names in (self.experts.stacked.values() if self.experts else ()) for part in names}
        if missing := parts - expert.keys():
            raise ValueError(f"stacked: {min(missing)} is no tensor of an expert")
        return self


def joined(several: Iterable[Tensors]) -> Tensors:
    """All of several, the later ones where names are the same."""
    return {name: axes for tensors in several for name, axes in tensors.items()}
