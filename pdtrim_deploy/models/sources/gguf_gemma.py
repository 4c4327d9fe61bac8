"""What a GGUF file of Gemma-3 leaves to the reader, as llama.cpp's reader of such files has it.

Names of the two further norms, keys of config.json that are the same for the whole family, and a tokenizer of pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError

GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LOCAL_THETA, _EVERY = 10000.0, 6  # of layers with windows; one in so many has none
_OWN_SCALE = 62  # blocks of the one size (27B) whose queries are not scaled by the size of a head
_NORMAL, _USER_DEFINED = 1, 4  # gguf.TokenType


def gemma_keys(meta: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keys of config.json beside those that all families share.

    Raises:
        UserError: logits are capped, which the published models of this family do not do.

    """
    if capped := [name for name in meta if name.endswith("logit_softcapping") and meta[name]]:
        raise UserError(f"{path}: GGUF key {capped[0]} is not read; give the HF folder as hf:DIR")
    head = config["head_dim"]
    by_width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "sliding_window_pattern": _EVERY,
        "rope_local_base_freq": _LOCAL_THETA,
        "query_pre_attn_scalar": by_width if config["num_hidden_layers"] == _OWN_SCALE else head,
    }


def gemma_pieces(vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> Any:
    """A `tokenizers.Tokenizer` of a SentencePiece BPE, without its added tokens: spaces are `▁`, other bytes `<0x..>`.

    A piece is joined from any two that make it up; of several joins in a text the one of the highest score is first.
    """
    import tokenizers

    joins = list[tuple[float, int, int, tuple[str, str]]]()
    for piece, number in vocab.items():
        if types[number] not in (_NORMAL, _USER_DEFINED):
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                joins.append((-scores[number], vocab[left], vocab[right], (left, right)))
    joins.sort()
    model = tokenizers.models.BPE(
        dict(vocab), [pair for *_, pair in joins], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
