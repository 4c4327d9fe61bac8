"""The facts of a stage checkpoint that the graph needs, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdtrim_builders.graph.ops import KV_WRITE, PAGED_ATTENTION, SPARSE_KV_SEND
from pdtrim_builders.graph.rope import rope_settings
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.graph_io import packed_output, rows_input
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import family_of
from pdtrim_deploy.models.quantized import read_quantized
from pdtrim_deploy.models.tensors import TensorInfo, read_tensor_index
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Stage


@dataclass(frozen=True)
class SendRule:
    """One layer of prefill whose prompt KV travels.

    Attributes:
        decode_layer: the KV layer of decode that reads it; names the graph output and the op's `layer_id`.
        prefill_layer: the KV layer of prefill that computes it.

    """

    decode_layer: int
    prefill_layer: int
    send: KVSend

    @property
    def rows_input(self) -> str:
        """Graph input with the rows to send: `send_rows_full`, or with the numbers of the rule (`graph_io`)."""
        return rows_input(self.send)

    @property
    def output(self) -> str:
        """Graph output with the packed rows."""
        return packed_output(self.decode_layer)


@dataclass(frozen=True)
class StageModel:
    """A stage checkpoint: sizes, plan and tensors. Layers are those of the stage model."""

    path: Path
    stage: Stage
    plan: PDPlan
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    norm_epsilon: float
    rope: Mapping[str, Any]

    @property
    def dtype(self) -> str | None:
        """Of its weights, by its config.json."""
        return self.config.get("dtype") or self.config.get("torch_dtype")

    @property
    def kv_only(self) -> tuple[int, ...]:
        """KV-only layers; decode has none."""
        return self.plan.kv_only_layers if self.stage == "prefill" else ()

    @property
    def kv_layers(self) -> dict[int, int]:
        """By layer, which KV layer it is; layers without attention are absent."""
        of_block = {block: number for number, block in enumerate(self.plan.kv_blocks(self.stage))}
        blocks = self.plan.layers(self.stage)
        return {layer: of_block[block] for layer, block in enumerate(blocks) if block in of_block}

    @property
    def without_mlp(self) -> frozenset[int]:
        """Layers whose attention runs alone."""
        missing = self.plan.missing(self.stage)
        layers = enumerate(self.plan.layers(self.stage))
        return frozenset(layer for layer, block in layers if missing.get(block) == "mlp")

    @property
    def window(self) -> int | None:
        """Tokens that layers with a sliding window attend to, by transformers; None without, or if all positions."""
        config = family_of(self.config, str(self.path)).model_class.config_class.from_dict(dict(self.config))
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        slides = window is not None and window < self.positions and (kinds is None or "sliding_attention" in kinds)
        return window if slides else None

    @property
    def custom_nodes(self) -> dict[str, int]:
        """Nodes of domain `pdtrim` that its graph has, by op; all of them."""
        alone = len(self.kv_only)
        counts = {PAGED_ATTENTION: len(self.kv_layers) - alone, KV_WRITE: alone, SPARSE_KV_SEND: len(self.sends)}
        return {op: count for op, count in counts.items() if count}

    @property
    def sends(self) -> tuple[SendRule, ...]:
        """Layers that prefill sends, in wire order (decode's layers); empty for decode."""
        if self.stage == "decode":
            return ()
        pairs = enumerate(zip(self.plan.layer_map, self.plan.kv, strict=True))
        return tuple(SendRule(layer, source, send) for layer, (source, send) in pairs)


def read_stage(stage_dir: Path, stage: Stage | None = None) -> StageModel:
    """Read a stage folder of a bundle; `stage` is by default the folder's name.

    Raises UserError: no plan in it, an unknown stage, other layers than the plan's, or an activation, RoPE or
    architecture that the graph does not support, quantised weights.
    """
    named = stage or stage_dir.name
    if named not in STAGES:
        raise UserError(
            f"{stage_dir}: the folder's name does not say its stage; give option stage, one of {', '.join(STAGES)}"
        )
    which: Stage = "prefill" if named == "prefill" else "decode"
    config = read_config(stage_dir / "config.json")
    if "pdtrim" not in config:
        raise UserError(f"{stage_dir}: its config.json carries no plan; give a stage folder of a bundle")
    _check_graph(config, stage_dir)
    if (quantized := read_quantized(stage_dir, config)) is not None:
        raise UserError(
            f"{stage_dir}: no engine computes with weights in {quantized.label}; serve it by SGLang's model"
        )
    plan = PDPlan.parse(config["pdtrim"], str(stage_dir))
    layers = config["num_hidden_layers"]
    if layers != len(plan.layers(which)):
        raise UserError(
            f"{stage_dir}: {layers} layers, the plan gives {which} {len(plan.layers(which))}; build the bundle again"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{stage_dir}: activation {config['hidden_act']!r} is not supported; supported: silu")
    try:
        rope = rope_settings(config)
    except UserError as error:
        raise UserError(f"{stage_dir}: {error}") from None
    heads = config["num_attention_heads"]
    return StageModel(
        path=stage_dir,
        stage=which,
        plan=plan,
        config=config,
        tensors=read_tensor_index(stage_dir),
        architecture=family_of(config, str(stage_dir)).architecture,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        rope=rope,
    )


def _check_graph(config: Mapping[str, Any], stage_dir: Path) -> None:
    family = family_of(config, str(stage_dir))
    if (reason := family.no_engine) is not None:
        raise UserError(f"{stage_dir}: {family.architecture} has no engine: {reason}; serve it by SGLang's own model")
