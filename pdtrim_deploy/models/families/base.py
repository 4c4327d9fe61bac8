"""What is known of one family of models. A family is a YAML file in this folder; this is what it may say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.blocks import EXPERT, EXPERTS, Blocks, FamilyData, Feature, joined
from pdtrim_deploy.models.families.latents import attention_tensors
from pdtrim_deploy.models.families.linear_attention import LinearAttention
from pdtrim_deploy.models.families.sizes import axis_size, axis_sizes, count_of
from pdtrim_deploy.models.families.windows import Windows
from pdtrim_deploy.plan import ExpertShape, LinearStates
from pdtrim_deploy.plan.linear_states import StateDtype

_MTP = "num_nextn_predict_layers"
_EXACT = ("e_score_correction_bias",)


class Latents(FamilyData):
    """What is known of latent attention and the blocks it stands in, beside the sizes in config.json.

    Attributes:
        implied: keys of config.json that SGLang reads and transformers does not, and the value that transformers
            computes with; another one is refused, a missing one written into stages.

    """

    implied: dict[str, Any] = Field(default_factory=dict)


class Family(FamilyData):
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
        named = known.common | joined(tensors for key, tensors in known.where.items() if config.get(key))
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


CAUSAL_LM = re.compile(r"\w+ForCausalLM")
