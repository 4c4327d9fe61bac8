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
from typing import Any

from pdtrim_deploy.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


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

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


def read_tensor_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a HF folder by name.

    Raises UserError: pickle-only weights, no weights, a missing shard, a truncated or damaged file.
    """
    if (folder / SINGLE).exists():  # before an index: where both are there, transformers loads this one
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        shards = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
        absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
        if absent:
            raise UserError(f"{folder}: {INDEX} promises {absent[0]}, which is not in its shard; get the model again")
        return {name: shards[shard][name] for name, shard in weight_map.items()}
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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file by name; UserError: it is missing, truncated or damaged."""
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
            header = json.loads(file.read(length).decode())
            metadata = header.pop("__metadata__", None) or {}
            tensors = {name: _info(path, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            raise damaged from None
    ordered = sorted(tensors.values(), key=lambda info: (info.start, info.stop))
    ends = [8 + length, *(info.stop for info in ordered)]
    gapless = [info.start for info in ordered] == ends[:-1] and ends[-1] == size  # as safetensors has them
    if not gapless or not _all_text(metadata):
        raise damaged
    return tensors


def _info(path: Path, entry: dict[str, Any], data: int) -> TensorInfo:
    """What a header says of one tensor; ValueError or TypeError where its numbers do not go together."""
    (start, stop), shape = entry["data_offsets"], entry["shape"]
    if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise ValueError("no size")
    if 8 * (stop - start) != math.prod(shape) * _BITS[entry["dtype"]]:
        raise ValueError("another size")
    return TensorInfo(path, entry["dtype"], tuple(shape), data + start, data + stop)


def _all_text(mapping: object) -> bool:
    return isinstance(mapping, dict) and all(isinstance(text, str) for text in mapping.values())


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError):
        weight_map = None
    if not _all_text(weight_map):
        raise UserError(f"{path}: no weight_map from tensors to files in it; get the model again")
    return weight_map
