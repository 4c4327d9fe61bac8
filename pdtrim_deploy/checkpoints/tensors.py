"""What stands in a folder's safetensors files, read from their headers and checked against their sizes.

Format: 8 bytes little-endian header length, JSON header `{name: {dtype, shape, data_offsets}}`, then the data.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pdtrim_deploy.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shard, its dtype in safetensors' words (BF16, F32, ...), shape and place in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_tensor_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a HF folder by name.

    Raises UserError: pickle-only weights, no weights, a missing shard, a truncated or damaged file.
    """
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        shards = {name: _read_header(folder / name) for name in sorted(set(weight_map.values()))}
        absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
        if absent:
            raise UserError(f"{folder}: {INDEX} promises {absent[0]}, which is not in its shard; get the model again")
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    if (folder / SINGLE).exists():
        return _read_header(folder / SINGLE)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: only pickle weights ({pickles[0]}), which could run code and are never loaded; "
            "convert the model to safetensors"
        )
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")


def tensor_digests(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256 of the bytes), sorted by name; reads every shard through one memory map."""
    maps: dict[Path, mmap.mmap] = {}
    for name in sorted(tensors):
        info = tensors[name]
        if info.file not in maps:
            with info.file.open("rb") as file:
                maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with memoryview(maps[info.file]) as view:
            yield name, sha256(view[info.start : info.stop]).hexdigest()
    for mapped in maps.values():
        mapped.close()


def _read_header(path: Path) -> dict[str, TensorInfo]:
    if not path.exists():
        raise UserError(f"{path}: missing shard; get the model again")
    damaged = UserError(f"{path}: truncated or damaged safetensors file; get the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise damaged
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    8 + length + entry["data_offsets"][1],
                )
                for name, entry in header.items()
            }
        except (ValueError, AttributeError, TypeError, KeyError, IndexError):
            raise damaged from None
    if max((info.stop for info in tensors.values()), default=8 + length) != size:
        raise damaged
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no weight_map in it; get the model again") from None
