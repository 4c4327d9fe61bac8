"""Whether config.json tells of plain KV: in every layer one row of K and one of V a token and KV head, all of a size.

What a config does not tell, its modules do (`models/runs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.latents import LATENT_KEY, has_latents

_PARTS = (
    "vision_config",
    "audio_config",
    "text_config",
    "thinker_config",
    "language_config",
    "llm_config",
    "speech_config",
)
_STATE = (
    "linear_attn_config",
    "linear_num_key_heads",
    "linear_key_head_dim",
    "mamba_d_state",
    "mamba_num_heads",
    "mamba_n_heads",
    "ssm_cfg",
    "ssm_state_size",
    "state_size",
    "hybrid_override_pattern",
    "layers_block_type",
    "block_types",
    "attn_type_list",
    "full_attn_idxs",
    "conv_L_cache",
)
_HYBRID = "it is a hybrid: some of its layers keep a state instead of KV ({}), which is sent of known families alone"
_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (_PARTS, "it is multimodal (key {}); give the folder of its language model alone"),
    (
        ("is_encoder_decoder",),
        "it is an encoder-decoder (key {}), whose decoder reads the encoder's KV besides its own; give a decoder-only "
        "model",
    ),
    (
        ("use_bidirectional_attention",),
        "a prompt's tokens attend to those behind them (key {}), so that its KV is not that of a decoder",
    ),
    (
        ("index_topk", "index_head_dim", "sparse_attention_config"),
        "its attention keeps an index beside K and V (key {}), which would have to travel too",
    ),
    (_STATE, _HYBRID.format("key {}")),
    (
        ("num_kv_shared_layers", "cla_share_factor"),
        "some of its layers read the KV of others (key {}), and a plan gives each layer its own",
    ),
    (
        ("block_configs", "global_head_dim", "num_global_key_value_heads", "swa_num_key_value_heads"),
        "its layers differ in the KV they hold (key {}), and a plan has one shape for all",
    ),
)
"""Keys of config.json that are set where KV is another, and what it is then."""
_LATENTS = (
    f"its KV is one latent row a token (multi-head latent attention, key {LATENT_KEY}), not rows of K and V; such rows "
    "are sent of known families alone"
)
_STATE_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"}
_WINDOWS_OFF = {"qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"}
"""Model types without windows where `use_sliding_window` is left out."""


def check_plain(
    config: Mapping[str, Any],
    where: str,
    *,
    takes_windows: bool = False,
    takes_latents: bool = False,
    takes_states: bool = False,
) -> None:
    """Refuse other KV.

    Args:
        takes_windows: the family sends its windows, or its workers refuse texts that are longer.
        takes_latents: the family sends its latents.
        takes_states: the family sends the states of its layers with linear attention.

    Raises:
        UserError: one sentence: the architecture, what its KV is, and what would be missing for it.

    """
    for reason in _reasons(config, takes_windows, takes_latents, takes_states):
        named = config.get("architectures") or [config.get("model_type")]
        raise UserError(f"{where}: architecture {named[0]} is not supported: {reason}")


def _reasons(config: Mapping[str, Any], takes_windows: bool, takes_latents: bool, takes_states: bool) -> Iterator[str]:
    if has_latents(config) and not takes_latents:
        yield _LATENTS
    for keys, reason in _REASONS:
        if takes_states and keys is _STATE:
            continue
        if key := next((key for key in keys if config.get(key)), None):
            yield reason.format(key)
    yield from _of_layers(config, _layer_types(config), takes_windows, takes_states)
    yield from () if takes_latents else _of_heads(config)
    rope = {**_mapping(config.get("rope_scaling")), **_mapping(config.get("rope_parameters"))}
    if (kind := rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
        yield f"the angles of its RoPE ({kind}) depend on a text's length, so that prefill's keys would not be decode's"


def _of_layers(config: Mapping[str, Any], kinds: set[str], takes_windows: bool, takes_states: bool) -> Iterator[str]:
    if states := sorted(kinds & _STATE_LAYERS - ({"linear_attention"} if takes_states else set())):
        yield _HYBRID.format(f"layer_types has {states[0]}")
    if config.get("attention_chunk_size") and (not kinds or "chunked_attention" in kinds):
        yield "some of its layers attend within chunks (key attention_chunk_size), whose KV is not planned yet"
    if not takes_windows and (window := _window(config, kinds)):
        yield (
            f"layers attend to the last {window} tokens alone (sliding window), and SGLang keeps such KV in a pool of "
            "its own, which is sent of known families alone"
        )


def _of_heads(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("num_key_value_heads", "num_attention_heads"):
        if isinstance(config.get(key), list):
            yield f"its layers differ in heads (key {key} is a list), and a plan has one number for all"
    value, head = config.get("v_head_dim"), config.get("head_dim")
    if value and head and value != head:
        yield f"its V heads are {value} wide and its K heads {head}, and a plan has one head size for both"


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _layer_types(config: Mapping[str, Any]) -> set[str]:
    types = config.get("layer_types")
    return {kind for kind in types if isinstance(kind, str)} if isinstance(types, list) else set()


def _window(config: Mapping[str, Any], kinds: set[str]) -> int | None:
    """The window that some layer has, where it is shorter than the context."""
    if not config.get("use_sliding_window", config.get("model_type") not in _WINDOWS_OFF):
        return None
    if kinds and "sliding_attention" not in kinds:
        return None
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    if not isinstance(window, int) or (isinstance(positions, int) and window >= positions):
        return None
    return window
