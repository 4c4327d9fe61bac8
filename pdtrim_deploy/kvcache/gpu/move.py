"""Give a chunk's tables to the Triton kernels: one launch each, nothing that the host waits for. Needs triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.rotated import GRIDS, halvings
from pdtrim_deploy.kvcache.gpu import faults
from pdtrim_deploy.kvcache.gpu.codes import UNFUSED
from pdtrim_deploy.kvcache.gpu.kernels import pack_runs, unpack_runs
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout
from pdtrim_deploy.kvcache.sections import native_name
from pdtrim_deploy.kvcache.table import DTYPES, MAX_TABLES, Groups, Table, chunk_tables, dense_slots
from pdtrim_deploy.plan.wire import CODES, ITEM_BYTES, Code, rotated_group, row_sections

TILE = 4096  # values that a program moves; 32 a thread
LINE = 16  # bytes of the widest load


def move(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
    *,
    pack: bool,
) -> bool:
    """Pack (or unpack) a chunk as `pdtrim_deploy.kvcache.pack` says, on the current stream of the pools' device.

    Nothing waits, so a slot outside its pool is not refused here: it is neither read nor written, and `check` raises.

    Returns:
        False when it must be done by torch instead.

    Raises:
        ValueError: as `pack`.

    """
    tables = chunk_tables(layout, keys, values, offsets, groups, pack=pack)
    if not tables or packed.data_ptr() % 4:
        return False
    slots, group_stride = dense_slots(slots)
    device = slots.device
    for table in tables:
        turns = offsets.table(table.turned) if offsets is not None and table.turned else None
        form = _resident(table, pack, device, _stream(device))
        launch(
            pack_runs if pack else unpack_runs, form.programs, device,
            form.runs, len(table.runs), slots, group_stride,
            packed, turns, _origin(device), _fault(device), **form.constants,
        )  # fmt: skip
    return True


def check(device: torch.device) -> None:
    """Call it when the event of a chunk has come that this thread has queued: it costs no transfer.

    Raises:
        IndexError: since the last call a chunk of this thread, on this device, had a slot outside its pool.

    """
    faults.check(_fault(device))


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **compiled: Any) -> None:
    """One kernel, on the device of the tensors whatever the thread's own is."""
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*arguments, **compiled, **UNFUSED)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **compiled, **UNFUSED)


class _Resident(NamedTuple):
    """A table on a device: int64, of each run the first program, then all runs; `programs` in all."""

    runs: Tensor
    programs: int
    constants: dict[str, Any]


@lru_cache(maxsize=MAX_TABLES)
def _resident(table: Table, pack: bool, device: torch.device, stream: int) -> _Resident:
    """Made once for each stream that uses it, which therefore needs to wait for no other's copy."""
    compiled = constants(table, pack)
    programs = (triton.cdiv(rows * table.heads, compiled["VECTORS"]) for rows in table.column("rows"))
    *first, total = accumulate(programs, initial=0)
    runs = torch.tensor([*first, *table.runs.flatten().tolist()])
    return _Resident(to_device(runs, device), total, compiled)


def to_device(runs: Tensor, device: torch.device) -> Tensor:
    """By one copy that the host does not wait for."""
    if device.type == "cuda":
        runs = runs.pin_memory()
    return runs.to(device, non_blocking=True)


def constants(table: Table, pack: bool) -> dict[str, Any]:
    """What a kernel is compiled for; the same for all chunks of a plan but those that lack some of its codes.

    Rotated codes bring native ones: of chunks that are alike otherwise only the first has a sink's row.
    """
    width, native = triton.next_power_of_2(table.head_dim), native_name(table.dtype)
    stages = halvings(table.head_dim)
    native_too: set[Code] = {"native"} if table.codes & GRIDS.keys() else set()
    codes = table.codes | native_too
    sections = [kind for code in codes for kind in row_sections(code, native, table.head_dim)]
    means = table.heads * table.head_dim * ITEM_BYTES["float32"]  # scales lie so far behind them
    sizes = [table.heads * kind.per_head * ITEM_BYTES[kind.dtype] for kind in sections]
    return {
        "HEADS": table.heads,
        "DIM": table.head_dim,
        "DTYPE": DTYPES.index(table.dtype),
        "SENT": sum(1 << CODES.index(code) for code in codes),
        "OFFSETS": bool(table.turned),
        "VECTORS": max(1, TILE // width),
        "WIDTH": width,
        "STAGES": stages,
        "GROUP": rotated_group(table.head_dim),
        "UNIT": 2.0 ** -(stages // 2 if pack else (stages + 1) // 2),
        "ALIGN": gcd(LINE, *table.column("pool"), *table.column("mean"), means, *table.column("stride")),
        "WIRE_ALIGN": gcd(LINE, *sizes, *table.column("codes"), *table.column("scales")),
    }


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache
def _origin(device: torch.device) -> Tensor:
    """A pointer to address 0, to which a kernel adds a table's addresses: alignment survives that, but no cast."""
    return torch.empty(0, dtype=torch.uint8, device=device)


def _fault(device: torch.device) -> Tensor:
    return faults.flag_of(device)
