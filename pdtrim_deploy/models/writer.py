"""Write safetensors shards, holding one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.tensors import INDEX, SINGLE

MAX_SHARD_BYTES = 4_000_000_000


def save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Store `tensors` in `file`.

    Raises:
        UserError: it cannot be written, say since the disk is full (safetensors' own error is no OSError).

    """
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
        )
    except SafetensorError as error:
        reason = str(error).rpartition("I/O error: ")[2]
        raise UserError(f"cannot write {file} ({reason}); free some space and run the same command again") from error


def write_shards(
    folder: Path,
    elements: Mapping[str, int],
    get: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keeps_dtype: Callable[[str], bool] = lambda _: False,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Cast `get(name)` to `dtype` and store it, for every name of `elements` (name -> number of elements).

    A tensor whose name `keeps_dtype` is stored as it is; shards are filled as if it were cast. `note` hears how far it
    is.
    """

    def cast(name: str) -> torch.Tensor:
        return get(name) if keeps_dtype(name) else get(name).to(dtype)

    shards: list[list[str]] = [[]]
    used = 0
    for name, count in elements.items():
        size = count * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    weight_map: dict[str, str] = {}
    total = written = 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        stored = dict[str, torch.Tensor]()
        for name in names:
            stored[name] = cast(name)
            written += 1
            note(f"tensors to write: {written}/{len(elements)}")
        note(f"writing {file}: {number}/{len(shards)} files")
        total += sum(tensor.nbytes for tensor in stored.values())
        save(stored, folder / file)
        del stored
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
