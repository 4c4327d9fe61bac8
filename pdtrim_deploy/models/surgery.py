"""Block surgery: a model with some of its blocks, in memory and on disk."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import atomic_directory
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.provenance import LICENCE_FILES
from pdtrim_deploy.models.writer import MAX_SHARD_BYTES, write_shards

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


def keep_blocks(model: Any, blocks: Sequence[int], replacements: Replacements | None = None) -> Any:
    """A new model with those blocks, in that order; parameters are shared, everything else is its own.

    The given model is left as it was: `layer_idx`, config and hooks differ, the weights are the same tensors (so
    training one would train the other). Costs milliseconds. `replacements` as in `write_stage`: those tensors are
    cast to the model's dtype, and its alone, on the device of their block.
    """
    _check_blocks(blocks, len(model.model.layers))
    cut = _twin(model)
    cut.model.layers = nn.ModuleList([cut.model.layers[block] for block in blocks])
    for index, layer in enumerate(cut.model.layers):
        _renumber(layer, index)
    config = copy.deepcopy(model.config)
    for module in cut.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
    config.num_hidden_layers = len(blocks)
    for key, value in known_family(type(model).__name__).cut_config(model.config, blocks).items():
        setattr(config, key, value)
    for block, parts in (replacements or {}).items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        layer = cut.model.layers[list(blocks).index(block)]
        for name, tensor in parts.items():
            _replace(layer, f"{_LAYERS}{block}.", name, tensor)
    return cut


def write_stage(
    checkpoint: Checkpoint,
    out_dir: Path,
    blocks: Sequence[int],
    dtype: str,
    pdtrim: Mapping[str, Any],
    *,
    replacements: Replacements | None = None,
    files: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the HF folder of a stage that runs `blocks` (original indices, ascending), one shard in memory at a time.

    Every tensor is cast to `dtype` ("float32", "bfloat16" or "float16"); `pdtrim` goes into config.json under that
    key. `replacements` gives, for blocks in `blocks`, tensors by their name within the block
    ("self_attn.q_proj.weight") in transformers' module, of the shapes they have: students of distilled pairs, healed
    weights. `files` are copied into the folder.

    The folder appears whole or not at all. An earlier stage in its place is replaced; anything else there is refused
    (UserError).
    """
    _check_blocks(blocks, checkpoint.facts.num_blocks)
    if list(blocks) != sorted(blocks):
        raise UserError(f"blocks of a stage must ascend, not {list(blocks)}")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    _check_replaceable(out_dir)
    changed = _replacements(checkpoint, blocks, replacements or {})
    names = _stage_names(checkpoint, blocks)

    def get(name: str) -> torch.Tensor:
        source = names[name]
        if source in changed:
            return changed[source]
        with safe_open(checkpoint.tensors[source].file, framework="pt") as shard:
            return shard.get_tensor(source)

    elements = {name: checkpoint.tensors[source].elements for name, source in names.items()}
    with atomic_directory(out_dir) as folder:
        write_shards(folder, elements, get, TORCH_DTYPES[dtype], max_shard_bytes, checkpoint.family.keeps_dtype)
        copied = {p for pattern in _COPIED for p in checkpoint.path.glob(pattern) if p.is_file()}
        for path in (*sorted(copied), *files):
            shutil.copyfile(path, folder / path.name)
        config = _stage_config(checkpoint, blocks, dtype) | {"pdtrim": dict(pdtrim)}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


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


def _stage_names(checkpoint: Checkpoint, blocks: Sequence[int]) -> dict[str, str]:
    """Name in the stage -> name in the source, in the order they are stored: embeddings, blocks, the rest."""
    place = {block: index for index, block in enumerate(blocks)}
    names: dict[tuple[int, str], str] = {}
    for source in sorted(checkpoint.tensors):
        if not source.startswith(_LAYERS):
            names[(-1, source)] = source
            continue
        number, _, inner = source.removeprefix(_LAYERS).partition(".")
        if int(number) in place:
            index = place[int(number)]
            names[(index, f"{_LAYERS}{index}.{inner}")] = source
    return {name: names[(index, name)] for index, name in sorted(names)}


def _replacements(checkpoint: Checkpoint, blocks: Sequence[int], given: Replacements) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for block, parts in given.items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        prefix = f"{_LAYERS}{block}."
        names = DiskNames(checkpoint.family, checkpoint.config, block)
        for name, tensor in parts.items():
            sources = names.of(name)
            shapes = [info.shape for source in sources if (info := checkpoint.tensors.get(prefix + source))]
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


def _stage_config(checkpoint: Checkpoint, blocks: Sequence[int], dtype: str) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    config |= checkpoint.family.cut_config(checkpoint.family.model_class.config_class.from_dict(config), blocks)
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
