"""A GGUF file's byte-level BPE, or Gemma's pieces, as a HF fast tokenizer.

Not transformers' own GGUF tokenizer: 5.14.1 gives SmolLM2 `<|im_start|>` as its end token (bos and eos swapped in
`GGUFLlamaConverter`), splits digits otherwise than the model was trained, and takes eight times as long.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.sources.gguf_gemma import gemma_pieces

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(tokenizers: Any) -> Any:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm(tokenizers: Any) -> Any:
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    return tokenizers.pre_tokenizers.Sequence([digits, _byte_level(tokenizers)])


def _split(number: str) -> Callable[[Any], Any]:
    def build(tokenizers: Any) -> Any:
        pre = tokenizers.pre_tokenizers
        words = pre.Split(tokenizers.Regex(_WORDS % number), behavior="isolated")
        return pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


_PRE: dict[str, Callable[[Any], Any]] = {
    "smollm": _smollm,
    "qwen2": _split(""),
    "llama-bpe": _split("{1,3}"),
    "gpt-2": _byte_level,
}


def _bytes_of(meta: dict[str, Any], vocab: dict[str, int], pre: str) -> Any:
    """The byte-level BPE of the metadata, without its added tokens."""
    import tokenizers

    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE[pre](tokenizers)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def write_tokenizer(meta: dict[str, Any], out: Path, where: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja from GGUF metadata.

    Raises UserError for another tokenizer than byte-level BPE with a pre-tokenizer that we know, or Gemma's.
    """
    import tokenizers

    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    pieces = kind == "llama" and meta["general.architecture"] == "gemma3"
    if not pieces and (kind != "gpt2" or pre not in _PRE):
        raise UserError(
            f"{where}: tokenizer {kind!r} with pre-tokenizer {pre!r} cannot be read from GGUF (only 'gpt2' with "
            f"{', '.join(_PRE)}); give the model's HF folder as hf:DIR"
        )
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = (
        gemma_pieces(vocab, meta["tokenizer.ggml.scores"], types) if pieces else _bytes_of(meta, vocab, str(pre))
    )
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (_CONTROL, _USER_DEFINED):
            special = type_ == _CONTROL
            # a piece is matched in text whose spaces are replaced
            tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=pieces and not special, special=special)])
    named = {
        f"{name}_token": tokens[meta[f"tokenizer.ggml.{gguf_name}_token_id"]]
        for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{gguf_name}_token_id" in meta
    }
    # Llama 3's files need not say so: llama.cpp takes it from the pre-tokenizer's name
    if meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = named["bos_token"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta[f"{meta['general.architecture']}.context_length"],
        **named,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if "tokenizer.chat_template" in meta:
        (out / "chat_template.jinja").write_text(meta["tokenizer.chat_template"])
