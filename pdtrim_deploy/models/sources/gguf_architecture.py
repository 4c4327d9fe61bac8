"""Which GGUF architectures are read; any other is refused before its tensors and its tokenizer are looked at.

A reader of all keys takes long over a large vocabulary; the architecture stands in the first keys.
Layout: "GGUF", uint32 version, uint64 tensors, uint64 keys, then key by key: name, uint32 type, value.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from pdtrim_deploy.errors import UserError

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_WINDOWS = "its layers have sliding windows, and are not read from GGUF; give the HF folder as hf:DIR"
_LATENT = "its attention keeps latents (MLA), whose maps are not read from GGUF; give the HF folder as hf:DIR"
_LINEAR = "its linear attention is not read from GGUF; give the HF folder as hf:DIR"
_HYBRID = (
    "it is a hybrid: some of its layers keep a state instead of KV, which is sent of HF folders of known families alone"
)
_EXPERTS = "its experts are not read from GGUF; give the HF folder as hf:DIR"
_REASONS = {
    **dict.fromkeys(("gemma2", "gemma3n", "gpt-oss", "cohere2", "exaone4", "olmo3"), _WINDOWS),
    **dict.fromkeys(("deepseek2", "minicpm3", "plm"), _LATENT),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "falcon-h1", "nemotron_h", "granitehybrid", "lfm2"), _HYBRID),
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), _LINEAR),
    **dict.fromkeys(("kimi-linear", "plamo2", "rwkv6", "rwkv7"), _HYBRID),
    **dict.fromkeys(("qwen2moe", "qwen3moe", "glm4moe", "olmoe", "minimax-m2"), _EXPERTS),
    **dict.fromkeys(("t5", "t5encoder"), "it is an encoder-decoder; give a decoder-only model"),
    **dict.fromkeys(("qwen2vl", "qwen3vl"), "it is multimodal; give a language model alone"),
}
_STRING, _NUMBERS = (
    8,
    {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8},
)  # bytes by type; 9 is a list


def refuse_other(path: Path) -> None:
    """Raise UserError for a GGUF file of another architecture, or one that is none."""
    try:
        with path.open("rb") as file:
            name = _architecture(file)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: truncated or not a GGUF file ({error}); get it again") from None
    if name not in ARCHITECTURES:
        reason = _REASONS.get(name, "its tensors have no place in a HF checkpoint that is known; give hf:DIR instead")
        raise UserError(
            f"{path}: GGUF architecture {name!r} is not supported: {reason}; those that are: {', '.join(ARCHITECTURES)}"
        )


def _architecture(file: BinaryIO) -> str:
    """The value of `general.architecture`, whatever stands before it; ValueError where nothing is."""
    if file.read(4) != b"GGUF":
        raise ValueError("no GGUF magic")
    *_, keys = struct.unpack("<IQQ", _read(file, 20))
    for _ in range(keys):
        name, kind = _string(file), _uint32(file)
        if name == "general.architecture" and kind == _STRING:
            return _string(file)
        _skip(file, kind)
    raise ValueError("no general.architecture")


def _skip(file: BinaryIO, kind: int) -> None:
    if kind in _NUMBERS:
        _read(file, _NUMBERS[kind])
    elif kind == _STRING:
        _string(file)
    elif kind == 9:
        inner, count = _uint32(file), _uint64(file)
        if inner in _NUMBERS:
            file.seek(count * _NUMBERS[inner], 1)
            return
        if inner == 9:
            raise ValueError("a list of lists")
        for _ in range(count):
            _skip(file, inner)
    else:
        raise ValueError(f"unknown type {kind}")


def _string(file: BinaryIO) -> str:
    return _read(file, _uint64(file)).decode()


def _uint32(file: BinaryIO) -> int:
    return int(struct.unpack("<I", _read(file, 4))[0])


def _uint64(file: BinaryIO) -> int:
    return int(struct.unpack("<Q", _read(file, 8))[0])


def _read(file: BinaryIO, count: int) -> bytes:
    if count > 1 << 24 or len(data := file.read(count)) != count:
        raise ValueError("it ends early")
    return data
