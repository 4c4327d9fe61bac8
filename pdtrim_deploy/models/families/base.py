"""What is known of one family of models. A family is a YAML file in this folder; this is what it may say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.latents import attention_tensors
from pdtrim_deploy.models.families.linear_attention import LinearAttention
from pdtrim_deploy.models.families.sizes import axis_size, axis_sizes, axis_terms, count_of
from pdtrim_deploy.models.families.windows import Windows
from pdtrim_deploy.plan import ExpertShape, LinearStates
from pdtrim_deploy.plan.linear_states import StateDtype

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
_MTP = "num_nextn_predict_layers"
_EXACT = ("e_score_correction_bias",)
_SIZES = ("q", "kv", "head", "hidden", "intermediate", "vocab")


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Experts(_Data):
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


class Blocks(_Data):
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
        for name, axes in (self.common | self.mlp | expert | _joined(self.where.values())).items():
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


class Latents(_Data):
    """What is known of latent attention and the blocks it stands in, beside the sizes in config.json.

    Attributes:
        implied: keys of config.json that SGLang reads and transformers does not, and the value that transformers
            computes with; another one is refused, a missing one written into stages.

    """

    implied: dict[str, Any] = Field(default_factory=dict)


class Family(_Data):
    """A decoder-only architecture. Its modules are `model.layers`, `model.embed_tokens`, `model.norm`, `lm_head`.

    Attributes:
        blocks: None where its KV alone is known: a model of it is planned, transferred, served and judged uncut.
        windows: of blocks that attend to a window of tokens; None where no block does, as far as workers serve it.
        latents: of attention that keeps latents (MLA) in SGLang, whose modules are DeepSeek's; None of any other.
        linear_attention: of blocks that keep a state instead of KV, whose modules are Qwen3-Next's; None of any other.
        sinks: whether each head of attention has a sink, a logit without a value.
        ties_embeddings: whether the LM head is the embedding where config.json does not say, as transformers has it:
            published models may leave it out.

    """

    architecture: str
    model_type: str = ""
    blocks: Blocks | None = None
    windows: Windows | None = None
    latents: Latents | None = None
    linear_attention: LinearAttention | None = None
    sinks: bool = False
    ties_embeddings: bool = False

    @property
    def takes_windows(self) -> bool:
        """Whether a config.json with windows is one of this family, whatever becomes of them."""
        return self.windows is not None or (self.blocks is not None and self.blocks.served_windows)

    def block_windows(self, config: Mapping[str, Any], where: str = "config.json") -> tuple[int | None, ...]:
        """As `Windows.of_blocks`; empty where the family has none."""
        return self.windows.of_blocks(config, where) if self.windows else ()

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the LM head is the embedding."""
        return bool(config.get("tie_word_embeddings", self.ties_embeddings))

    def linear_states(
        self, config: Mapping[str, Any], where: str = "config.json", dtype: StateDtype = "bfloat16"
    ) -> LinearStates | None:
        """As `LinearAttention.states`; None where the family has none."""
        return self.linear_attention.states(config, where, dtype) if self.linear_attention else None

    def expert_shape(self, config: Mapping[str, Any]) -> ExpertShape | None:
        """What a plan must know of the experts; None where the family has none, or its blocks are not known.

        Raises:
            UserError: config.json says that a token goes to more experts than there are.

        """
        if self.blocks is None or (experts := self.blocks.experts) is None:
            return None

        def number(key: str | None, other: int) -> int:
            return other if key is None or config.get(key.partition("|")[0]) is None else count_of(config, key)

        shape = ExpertShape(
            count=count_of(config, experts.count),
            top_k=count_of(config, experts.top_k),
            first_block=number(experts.dense_blocks, 0),
            groups=number(experts.groups, 1),
            top_groups=number(experts.top_groups, 1),
        )
        if not shape.smallest() <= shape.count or shape.count % shape.groups:
            raise UserError(
                f"config.json: {shape.count} experts in {shape.groups} groups, {shape.top_k} for each token, do not go "
                "together; get the model again"
            )
        return shape

    @property
    def expert_rows(self) -> tuple[str, ...]:
        """Tensors of a block with one row for each expert, by name on disk: a router's weights and corrections."""
        tensors = self.blocks.experts.tensors if self.blocks and self.blocks.experts else {}
        return tuple(name for name, axes in tensors.items() if axes[0] == EXPERTS)

    def is_dense(self, config: Mapping[str, Any], block: int) -> bool:
        """Whether a block has one MLP instead of experts."""
        experts = self.blocks.experts if self.blocks else None
        return experts is None or (experts.dense_blocks is not None and block < count_of(config, experts.dense_blocks))

    def block_tensors(self, config: Mapping[str, Any], block: int) -> dict[str, tuple[int, ...]]:
        """Names within the block, on disk, and shapes; of the attention alone, or empty, where blocks are not known."""
        if (known := self.blocks) is None:
            if self.linear_attention:
                return self.linear_attention.tensors(config, block)
            return attention_tensors(config) if self.latents else {}
        sizes = axis_sizes(config, known.sizes)
        named = known.common | _joined(tensors for key, tensors in known.where.items() if config.get(key))
        if self.is_dense(config, block):
            named = named | known.mlp
        elif known.experts:
            for name, axes in known.experts.tensors.items():
                numbers = range(count_of(config, known.experts.count)) if EXPERT in name else (0,)
                named |= {name.replace(EXPERT, str(number)): axes for number in numbers}
        return {name: tuple(axis_size(axis, sizes) for axis in axes) for name, axes in named.items()}

    def end_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """What stands before and behind the blocks."""
        rows = (config["vocab_size"], config["hidden_size"])
        ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": rows}
        if self.blocks:
            ends["model.norm.weight"] = rows[1:]
            if not self.tied(config):
                ends["lm_head.weight"] = rows
        return ends

    def required_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a whole checkpoint of this family and config must hold, as far as they are known."""
        tensors = self.end_tensors(config)
        for block in range(config["num_hidden_layers"]):
            named = self.block_tensors(config, block)
            tensors |= {f"model.layers.{block}.{name}": shape for name, shape in named.items()}
        return tensors

    def cut_config(self, full: Any, blocks: Sequence[int], experts: int | None = None) -> dict[str, Any]:
        """Keys of a stage's config that count blocks or list them; `full` is transformers' config of the whole model.

        Lists may be implied there (Qwen2's max_window_layers counts original blocks): a stage's are explicit. `experts`
        is how many each of its blocks has; None: as many as the model's.
        """
        known, cut = self.blocks or Blocks(common={}), dict[str, Any]()
        for key in ("layer_types", *known.cut_lists):
            if (values := getattr(full, key, None)) is not None:
                cut[key] = [values[block] for block in blocks]
        if known.experts and (dense := known.experts.dense_blocks):
            cut[dense] = sum(block < getattr(full, dense) for block in blocks)
        if known.experts and experts is not None:
            cut |= {key: experts for key in known.experts.count.split("|") if hasattr(full, key)}
        if self.latents and getattr(
            full, _MTP, None
        ):  # layers for speculation, numbered behind the last, are not copied
            cut[_MTP] = 0
        if self.linear_attention:
            cut |= self.linear_attention.stage_config(full)
        return cut | known.stage_config | (self.latents.implied if self.latents else {})

    def keeps_dtype(self, name: str) -> bool:
        """Whether a tensor is never cast: a router's correction, where nobody has said."""
        return name.endswith(_EXACT if self.blocks is None else self.blocks.exact)

    @property
    def no_engine(self) -> str | None:
        """Why no graph, and so no engine of any target, computes its stages; None: one does."""
        return "its blocks are not known" if self.blocks is None else self.refusal("engines")

    def refusal(self, feature: Feature) -> str | None:
        """Why a recipe of this family may not ask for `feature`; None: it may."""
        return self.blocks.refused.get(feature) if self.blocks else None

    @property
    def model_class(self) -> Any:
        """The transformers class of this name: taken directly, so a checkpoint's `auto_map` is never looked at.

        Raises:
            UserError: there is none.

        """
        import transformers

        if (model_class := getattr(transformers, self.architecture, None)) is None:
            raise UserError(
                f"architecture {self.architecture} is not supported: transformers {transformers.__version__} has no "
                "class of that name, and a model's own code is never run"
            )
        return model_class


def _joined(several: Iterable[Tensors]) -> Tensors:
    return {name: axes for tensors in several for name, axes in tensors.items()}


CAUSAL_LM = re.compile(r"\w+ForCausalLM")
