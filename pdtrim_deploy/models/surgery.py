"""Block surgery: a model with some of its blocks, and some of their experts, in memory and on disk."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import atomic_directory
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.experts import (
    ExpertNames,
    ExpertsByBlock,
    check_experts,
    check_formats,
    keep_in_memory,
    kept_count,
    parameters_by_expert,
    stage_rows,
)
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.provenance import LICENCE_FILES
from pdtrim_deploy.models.quantized.module_lists import cut_settings
from pdtrim_deploy.models.quantized.stage import quantize_like, stage_settings
from pdtrim_deploy.models.sublayers import check_missing, skip_sublayers, zero_outputs
from pdtrim_deploy.models.writer import MAX_SHARD_BYTES, write_shards
from pdtrim_deploy.plan import Sublayer

_LAYERS = "model.layers."
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
Replacements = Mapping[int, Mapping[str, torch.Tensor]]


def keep_blocks(
    model: Any,
    blocks: Sequence[int],
    replacements: Replacements | None = None,
    experts: ExpertsByBlock | None = None,
    missing: Mapping[int, Sublayer] | None = None,
) -> Any:
    """A new model with those blocks, in that order; parameters are shared, everything else is its own.

    The given model is left as it was: `layer_idx`, config and hooks differ, the weights are the same tensors (so
    training one would train the other). Costs milliseconds. `replacements` and `experts` as in `write_stage`: those
    tensors are cast to the model's dtype, and its alone, on the device of their block; weights of kept experts are
    copies. `missing` gives the sublayer that a block runs without: it is not there, nor are tensors of it.
    """
    _check_blocks(blocks, len(model.model.layers))
    check_missing(blocks, missing or {})
    family, experts, full = known_family(type(model).__name__), experts or {}, model.config.to_dict()
    check_experts(family, full, blocks, experts)
    cut = _twin(model)
    cut.model.layers = nn.ModuleList([cut.model.layers[block] for block in blocks])
    for index, (block, layer) in enumerate(zip(blocks, cut.model.layers, strict=True)):
        _renumber(layer, index)
        if block in experts:
            keep_in_memory(layer, parameters_by_expert(family, full, block), experts[block])
    config = copy.deepcopy(model.config)
    for module in cut.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
    config.num_hidden_layers = len(blocks)
    for key, value in family.cut_config(model.config, blocks, kept_count(experts)).items():
        setattr(config, key, value)
    for block, parts in (replacements or {}).items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        layer = cut.model.layers[list(blocks).index(block)]
        for name, tensor in parts.items():
            _replace(layer, f"{_LAYERS}{block}.", name, tensor)
    return skip_sublayers(cut, blocks, missing or {})


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
    the sublayer that a block runs without: its last projection is zero. `files` are copied into the folder.

    The folder appears whole or not at all; `note` hears how far it is. An earlier stage in its place is replaced;
    anything else there is refused (UserError).
    """
    _check_blocks(blocks, checkpoint.facts.num_blocks)
    if list(blocks) != sorted(blocks):
        raise UserError(f"blocks of a stage must ascend, not {list(blocks)}")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    _check_replaceable(out_dir)
    experts = experts or {}
    replacements = _with_zeros(checkpoint, blocks, replacements or {}, experts, missing or {})
    check_experts(checkpoint.family, checkpoint.config, blocks, experts)
    if experts:
        check_formats(checkpoint)
    changed = quantize_like(checkpoint, _replacements(checkpoint, blocks, replacements, experts))
    sources = _stage_names(checkpoint, blocks, experts)

    def get(name: str) -> torch.Tensor:
        source = sources[name]
        if source.name in changed:
            return changed[source.name]
        with safe_open(checkpoint.tensors[source.name].file, framework="pt") as shard:
            return stage_rows(shard.get_tensor(source.name), source.rows)

    elements = {name: source.elements(checkpoint) for name, source in sources.items()}

    def keeps_dtype(name: str) -> bool:
        return checkpoint.keeps_dtype(sources[name].name)

    with atomic_directory(out_dir) as folder:
        write_shards(folder, elements, get, TORCH_DTYPES[dtype], max_shard_bytes, keeps_dtype, note)
        copied = {p for pattern in _COPIED for p in checkpoint.path.glob(pattern) if p.is_file()}
        for path in (*sorted(copied), *files):
            shutil.copyfile(path, folder / path.name)
        config = _stage_config(checkpoint, blocks, dtype, kept_count(experts)) | {"pdtrim": dict(pdtrim)}
        for file, settings in stage_settings(checkpoint, blocks).items():
            (folder / file).write_text(json.dumps(settings, indent=2))
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _with_zeros(
    checkpoint: Checkpoint,
    blocks: Sequence[int],
    replacements: Replacements,
    experts: ExpertsByBlock,
    missing: Mapping[int, Sublayer],
) -> Replacements:
    """`replacements`, and zeros where a sublayer is missing."""
    if not missing:
        return replacements
    check_missing(blocks, missing)
    model_class = checkpoint.family.model_class
    with torch.device("meta"):
        model = model_class._from_config(model_class.config_class.from_dict(checkpoint.config))
    joined = {block: dict(parts) for block, parts in replacements.items()}
    for block, sublayer in missing.items():
        zeros = zero_outputs(model.model.layers[block], sublayer)
        if block in experts:  # what stacks experts along its first axis has the kept ones alone
            stacked = parameters_by_expert(checkpoint.family, checkpoint.config, block)
            zeros = {n: z[: len(experts[block])] if n in stacked else z for n, z in zeros.items()}
        joined[block] = joined.get(block, {}) | zeros
    return joined


def _check_blocks(blocks: Sequence[int], total: int) -> None:
    wrong = [block for block in blocks if not 0 <= block < total]
    if wrong:
        raise UserError(f"block {wrong[0]} does not exist; the model has blocks 0 to {total - 1}")
    if not blocks or len(set(blocks)) != len(blocks):
        raise UserError(f"blocks {list(blocks)}: at least one, and none twice")


def _check_replaceable(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    try:
        ours = "pdtrim" in json.loads((out_dir / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{out_dir} exists and is no stage checkpoint; remove it or choose another folder")


@dataclass(frozen=True)
class _Source:
    """A tensor of the original checkpoint, and the rows of it that the stage has; None: all."""

    name: str
    rows: Sequence[int] | None = None

    def elements(self, checkpoint: Checkpoint) -> int:
        info = checkpoint.tensors[self.name]
        return info.elements if self.rows is None else info.elements // info.shape[0] * len(self.rows)


def _stage_names(checkpoint: Checkpoint, blocks: Sequence[int], experts: ExpertsByBlock) -> dict[str, _Source]:
    """Names in the stage and what they come from, in the order they are stored: embeddings, blocks, the rest."""
    place = {block: index for index, block in enumerate(blocks)}
    by_block = {block: ExpertNames(checkpoint.family, experts.get(block)) for block in blocks}
    names: dict[tuple[int, str], _Source] = {}
    for source in sorted(checkpoint.tensors):
        if not source.startswith(_LAYERS):
            names[(-1, source)] = _Source(source)
            continue
        number, _, inner = source.removeprefix(_LAYERS).partition(".")
        if (index := place.get(int(number))) is None:
            continue
        expert_names = by_block[int(number)]
        if (name := expert_names.in_stage(inner)) is not None:
            names[(index, f"{_LAYERS}{index}.{name}")] = _Source(source, expert_names.rows(inner))
    return {name: names[(index, name)] for index, name in sorted(names)}


def _replacements(
    checkpoint: Checkpoint, blocks: Sequence[int], given: Replacements, experts: ExpertsByBlock
) -> dict[str, torch.Tensor]:
    """By the original's names; of a tensor with a row for each expert, the rows that the stage has."""
    tensors: dict[str, torch.Tensor] = {}
    for block, parts in given.items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        prefix = f"{_LAYERS}{block}."
        names = DiskNames(checkpoint.family, checkpoint.config, block, experts.get(block))
        rows = ExpertNames(checkpoint.family, experts.get(block)).rows
        for name, tensor in parts.items():
            sources = names.of(name)
            infos = {source: info for source in sources if (info := checkpoint.tensors.get(prefix + source))}
            shapes = [
                info.shape if (kept := rows(source)) is None else (len(kept), *info.shape[1:])
                for source, info in infos.items()
            ]
            _check_shape(prefix + name, tensor, names.shape(name, shapes) if len(shapes) == len(sources) else None)
            tensors |= {prefix + source: part for source, part in names.split(name, tensor)}
    return tensors


def _replace(layer: nn.Module, prefix: str, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    old = dict(layer.named_parameters()).get(name)
    _check_shape(prefix + name, tensor, None if old is None else tuple(old.shape))
    assert old is not None
    layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(
        tensor.to(device_of(layer), old.dtype), requires_grad=False
    )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...] | None) -> None:
    if tuple(tensor.shape) != expected:
        has = "has no such tensor" if expected is None else f"has {expected}"
        raise UserError(f"replacement of {name}: shape {tuple(tensor.shape)}, the block {has}")


def _stage_config(checkpoint: Checkpoint, blocks: Sequence[int], dtype: str, experts: int | None) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    config |= checkpoint.family.cut_config(
        checkpoint.family.model_class.config_class.from_dict(config), blocks, experts
    )
    if "quantization_config" in config:
        config["quantization_config"] = cut_settings(config["quantization_config"], blocks, checkpoint.tensors)
    return config | {"num_hidden_layers": len(blocks), "dtype": dtype, "torch_dtype": dtype}


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _twin(module: nn.Module) -> Any:
    """A copy of the module tree over the very same parameters and buffers."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # _modules, _parameters, _buffers, hooks
            twin.__dict__[name] = copy.copy(value)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    return twin
