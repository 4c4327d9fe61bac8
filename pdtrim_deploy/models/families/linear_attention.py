"""Which blocks of a model have linear attention, and what they keep of a request, from its config.json.

Of Qwen3-Next's and Qwen3.5's blocks one in `full_attention_interval` attends to all tokens and has KV. The others
have a gated delta net (arXiv:2412.06464). transformers reads the kinds of blocks from `layer_types`, SGLang 0.5.23
(configs/qwen3_next.py) from the interval alone, and its rotation from keys that transformers 5 no longer writes: so
stages have both, and a config.json in which the two differ is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.linear_states import LinearStates, StateDtype

LINEAR, FULL = "linear_attention", "full_attention"
_INTERVAL, _DEFAULT_INTERVAL = "full_attention_interval", 4
_PARTIAL, _DEFAULT_PARTIAL = "partial_rotary_factor", 0.25
_KERNEL, _KEY_HEADS, _VALUE_HEADS = "linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads"
_SIZES = {_KERNEL: 4, _KEY_HEADS: 16, _VALUE_HEADS: 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
"""Keys and the values that transformers and SGLang both take where config.json leaves them out."""
_MOST = 10_000  # blocks: each gets an entry


class LinearAttention(BaseModel):
    """Of a family some of whose blocks have gated delta nets, which SGLang computes as transformers does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def states(
        self, config: Mapping[str, Any], where: str = "config.json", dtype: StateDtype = "bfloat16"
    ) -> LinearStates:
        """The blocks with linear attention, and what each keeps, of a model that is served in `dtype`.

        Raises:
            UserError: config.json names other kinds of blocks, in another order than SGLang reads, or senseless sizes.

        """
        interval, blocks = _interval(config, where), _whole(config, "num_hidden_layers", where, most=_MOST)
        for key in ("num_key_value_heads", "head_dim"):  # transformers and SGLang imply others than Llama's
            _whole(config, key, where)
        sizes = {key: _whole(config, key, where, default) for key, default in _SIZES.items()}
        if sizes[_VALUE_HEADS] % sizes[_KEY_HEADS] or sizes[_KERNEL] < 2:
            raise UserError(
                f"{where}: {sizes[_KEY_HEADS]} key heads, {sizes[_VALUE_HEADS]} value heads and a convolution over "
                f"{sizes[_KERNEL]} tokens do not go together in linear attention; get the model again"
            )
        named = config.get("mamba_ssm_dtype") or "float32"
        recurrent: StateDtype | None = next((dtype for dtype in get_args(StateDtype) if dtype == named), None)
        if recurrent is None:
            allowed = ", ".join(get_args(StateDtype))
            raise UserError(f"{where}: key mamba_ssm_dtype is {named!r}; it must be one of {allowed}")
        return LinearStates(
            blocks=tuple(block for block in range(blocks) if (block + 1) % interval),
            key_heads=sizes[_KEY_HEADS],
            key_dim=sizes["linear_key_head_dim"],
            value_heads=sizes[_VALUE_HEADS],
            value_dim=sizes["linear_value_head_dim"],
            conv_columns=sizes[_KERNEL] - 1,
            conv_dtype=dtype,
            recurrent_dtype=recurrent,
        )

    def stage_config(self, full: Any) -> dict[str, Any]:
        """Keys of a stage's config.json that SGLang reads; `full` is transformers' config of the model."""
        rope = getattr(full, "rope_parameters", None) or {}
        kinds = {"layer_types": list(full.layer_types), "num_hidden_layers": len(full.layer_types)}
        keys = {_INTERVAL: _interval(kinds, "config.json"), _PARTIAL: rope.get(_PARTIAL, _DEFAULT_PARTIAL)}
        return keys | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})

    def tensors(self, config: Mapping[str, Any], block: int) -> dict[str, tuple[int, ...]]:
        """Of a block, on disk, those by which the sizes of its KV, or of its state, are known: names and shapes."""
        states, hidden = self.states(config), config["hidden_size"]
        if block not in states.blocks:
            kv = config["num_key_value_heads"] * config["head_dim"]
            return {f"self_attn.{name}_proj.weight": (kv, hidden) for name in "kv"}
        channels, columns = states.conv_shape()
        shapes = {
            "A_log": (states.value_heads,),
            "conv1d.weight": (channels, 1, columns + 1),
            "dt_bias": (states.value_heads,),
            "norm.weight": (states.value_dim,),
            "out_proj.weight": (hidden, states.value_heads * states.value_dim),
        }
        return {f"linear_attn.{name}": shape for name, shape in shapes.items()}

    def linear_weights(self, config: Mapping[str, Any]) -> int:
        """Weights of the maps of a block's linear attention, norms and the convolution left out."""
        states = self.states(config)
        values = states.value_heads * states.value_dim
        projected = 2 * states.key_heads * states.key_dim + 2 * values + 2 * states.value_heads
        return int(config["hidden_size"]) * (projected + values)


def _interval(config: Mapping[str, Any], where: str) -> int:
    """One in so many blocks attends to all tokens."""
    blocks, kinds = _whole(config, "num_hidden_layers", where, most=_MOST), config.get("layer_types")
    if kinds is None:
        interval = _whole(config, _INTERVAL, where, _DEFAULT_INTERVAL)
    elif not isinstance(kinds, list) or len(kinds) != blocks or not set(map(str, kinds)) <= {LINEAR, FULL}:
        raise UserError(
            f"{where}: key layer_types is {kinds!r}; it must have one of {FULL}, {LINEAR} for each of {blocks} blocks"
        )
    elif FULL not in kinds:
        raise UserError(f"{where}: key layer_types has no {FULL}, so that there is no KV to plan; serve it with SGLang")
    else:
        interval = kinds.index(FULL) + 1
    implied = [LINEAR if (block + 1) % interval else FULL for block in range(blocks)]
    if kinds is not None and (kinds != implied or config.get(_INTERVAL, interval) != interval):
        raise UserError(
            f"{where}: key layer_types is no pattern of one {FULL} in {config.get(_INTERVAL, interval)} blocks, and "
            f"SGLang 0.5.23 reads {_INTERVAL} alone, so that it would run other kinds of blocks; such a model cannot "
            "be served"
        )
    if not 1 < interval <= blocks:
        raise UserError(
            f"{where}: key {_INTERVAL} is {interval}; it must be from 2 to the number of blocks, {blocks}, so that "
            "there are blocks of both kinds"
        )
    return interval


def _whole(config: Mapping[str, Any], key: str, where: str, default: int | None = None, most: int = 1 << 20) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{where}: key {key} is {value!r}; it must be a whole number from 1 to {most}")
    return value
