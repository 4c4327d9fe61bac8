"""The HF folder of a stage: weights, settings, tokenizer and licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import atomic_directory
from pdtrim_deploy.models.body import narrowed
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.experts import ExpertsByBlock, check_experts, check_formats, kept_count, stage_rows
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.provenance import LICENCE_FILES
from pdtrim_deploy.models.quantized.module_lists import cut_settings
from pdtrim_deploy.models.surgery.checks import Replacements, check_blocks
from pdtrim_deploy.models.surgery.quantized import quantize_like, stage_settings
from pdtrim_deploy.models.surgery.stage_tensors import replaced_tensors, stage_names, with_zeros
from pdtrim_deploy.models.writer import MAX_SHARD_BYTES, write_shards
from pdtrim_deploy.plan import Sublayer

_COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    *LICENCE_FILES,
)


def write_stage(
    checkpoint: Checkpoint,
    out_dir: Path,
    blocks: Sequence[int],
    dtype: str,
    pdtrim: Mapping[str, Any],
    *,
    replacements: Replacements | None = None,
    experts: ExpertsByBlock | None = None,
    missing: Mapping[int, Sublayer] | None = None,
    mlp_width: int | None = None,
    files: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the HF folder of a stage that runs `blocks` (original indices, ascending), one shard in memory at a time.

    Every tensor is cast to `dtype` ("float32", "bfloat16" or "float16"), but for FP8 weights: they keep their codes and
    scales, and those that are replaced get new ones of the same kind. `pdtrim` goes into config.json under that key.
    `replacements` gives, for blocks in `blocks`, tensors by their name within the block ("self_attn.q_proj.weight") in
    transformers' module, of the shapes they have: students of distilled pairs, healed weights. `experts` gives the
    experts that the stage keeps, for each of `blocks` that has experts; they are numbered from 0 there. `missing` gives
    the sublayer that a block runs without: its last projection is zero. Of an MLP that never runs the stage has the
    first `mlp_width` channels; None: all. `files` are copied into the folder.

    The folder appears whole or not at all; `note` hears how far it is. An earlier stage in its place is replaced;
    anything else there is refused (UserError).
    """
    check_blocks(blocks, checkpoint.facts.num_blocks)
    if list(blocks) != sorted(blocks):
        raise UserError(f"blocks of a stage must ascend, not {list(blocks)}")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    _check_replaceable(out_dir)
    experts = experts or {}
    replacements = with_zeros(checkpoint, blocks, replacements or {}, experts, missing or {})
    check_experts(checkpoint.family, checkpoint.config, blocks, experts)
    if experts:
        check_formats(checkpoint)
    changed = quantize_like(checkpoint, replaced_tensors(checkpoint, blocks, replacements, experts))
    sources = stage_names(checkpoint, blocks, experts)
    shapes = narrowed(checkpoint.family, checkpoint.config, blocks, mlp_width)

    def get(name: str) -> torch.Tensor:
        source = sources[name]
        if source.name in changed:
            return first_of(changed[source.name], source.name)
        with safe_open(checkpoint.tensors[source.name].file, framework="pt") as shard:
            return first_of(stage_rows(shard.get_tensor(source.name), source.rows), source.name)

    def first_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
        return tensor[tuple(slice(size) for size in shapes[name])].contiguous() if name in shapes else tensor

    elements = {
        name: prod(shapes[source.name]) if source.name in shapes else source.elements(checkpoint)
        for name, source in sources.items()
    }

    def keeps_dtype(name: str) -> bool:
        return checkpoint.keeps_dtype(sources[name].name)

    with atomic_directory(out_dir) as folder:
        write_shards(folder, elements, get, TORCH_DTYPES[dtype], max_shard_bytes, keeps_dtype, note)
        copied = {p for pattern in _COPIED for p in checkpoint.path.glob(pattern) if p.is_file()}
        for path in (*sorted(copied), *files):
            shutil.copyfile(path, folder / path.name)
        config = _stage_config(checkpoint, blocks, dtype, kept_count(experts)) | {"pdtrim": dict(pdtrim)}
        config |= {} if mlp_width is None else {"intermediate_size": mlp_width}
        for file, settings in stage_settings(checkpoint, blocks).items():
            (folder / file).write_text(json.dumps(settings, indent=2))
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _check_replaceable(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    try:
        ours = "pdtrim" in json.loads((out_dir / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{out_dir} exists and is no stage checkpoint; remove it or choose another folder")


def _stage_config(checkpoint: Checkpoint, blocks: Sequence[int], dtype: str, experts: int | None) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    config |= checkpoint.family.cut_config(
        checkpoint.family.model_class.config_class.from_dict(config), blocks, experts
    )
    if "quantization_config" in config:
        config["quantization_config"] = cut_settings(config["quantization_config"], blocks, checkpoint.tensors)
    return config | {"num_hidden_layers": len(blocks), "dtype": dtype, "torch_dtype": dtype}
