"""Pack and unpack of a chunk of Llama-3.1-8B on a GPU: their share of a copy's bandwidth, and their launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from pdtrim_deploy.gpucheck.checks import Figure
from pdtrim_deploy.gpucheck.kernel_inputs import form, offset_plan
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan.wire import WireDtype

LLAMA = (32, 8, 128)  # layers, KV heads and head size of Llama-3.1-8B
TOKENS, REPEATS = 4096, 20


def bandwidth(device: torch.device, wire: WireDtype, tokens: int = TOKENS, repeats: int = REPEATS) -> Figure:
    """GB/s, all bytes read and written, of a chunk of Llama-3.1-8B in pages of 64, beside a copy of as many bytes."""
    steps, traffic = _llama(device, wire, tokens)
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = {"copy": lambda: target.copy_(source), **steps}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(3):
        for run in timed.values():
            run()
    for _ in range(repeats):
        for name, run in timed.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    median = {name: statistics.median(took) for name, took in seconds.items()}
    figure: Figure = {"tokens": tokens, "bytes_read_and_written": traffic, "repeats": repeats}
    for name, took in median.items():
        figure[f"{name}_gb_per_s"] = traffic / took / 1e9
        figure[f"{name}_seconds"] = took
        if name != "copy":
            figure[f"{name}_of_copy"] = median["copy"] / took
    return figure


def launches(device: torch.device, wire: WireDtype, tokens: int = 512) -> Figure:
    """What the profiler sees of one chunk: of a new one, and of one whose table is on the GPU already.

    Raises:
        AssertionError: more than two operations on the GPU, or a wait for it.

    """
    figure: Figure = {}
    for step in _llama(device, wire, tokens - 64)[0].values():  # compiles
        _profiled(step)
    for name, step in _llama(device, wire, tokens)[0].items():
        for state in ("new", "known"):
            operations, waits = _profiled(step)
            figure[f"{name}_{state}_operations"], figure[f"{name}_{state}_waits"] = operations, waits
    broken = [name for name, count in figure.items() if int(count) > (0 if name.endswith("waits") else 2)]
    assert not broken, f"more than 2 operations on the GPU, or a wait for it: {figure}"
    return figure


def _profiled(step: Callable[[], object]) -> tuple[int, int]:
    """Kernels and copies that a call puts on the GPU, and calls of the runtime in it that wait for the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("pdtrim chunk"):
            step()
        torch.cuda.synchronize()
    events: list[Any] = list(profiler.events())
    span = next(event for event in events if event.name == "pdtrim chunk" and event.device_type == DeviceType.CPU)
    within = [
        event
        for event in events
        if event.device_type == DeviceType.CPU
        and span.time_range.start <= event.time_range.start <= span.time_range.end
    ]
    operations = [e for e in events if e.device_type == DeviceType.CUDA and e.name != "pdtrim chunk"]
    waits = [event for event in within if "Synchronize" in event.name or event.name == "cudaMemcpy"]
    return len(operations), len(waits)


def _llama(device: torch.device, wire: WireDtype, tokens: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Pack and unpack of one chunk of Llama-3.1-8B by name, and the bytes that each reads and writes."""
    gpu = form()
    plan, offsets = offset_plan(wire, LLAMA, "bfloat16")
    layers, heads, head_dim = LLAMA
    pages = torch.randperm(2 * tokens // 64, generator=torch.Generator().manual_seed(0))
    slots = (pages[:, None] * 64 + torch.arange(64)).flatten()[:tokens].to(device)
    keys, values = (
        [torch.randn(2 * tokens, heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(layers)]
        for _ in range(2)
    )
    layout, there = chunk_layout(plan, tokens), offsets.to(device)
    there.table(tokens)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    steps: dict[str, Callable[[], object]] = {
        "pack": lambda: gpu.move(layout, packed, keys, values, slots, there, pack=True),
        "unpack": lambda: gpu.move(layout, packed, keys, values, slots, there, pack=False),
    }
    return steps, 2 * 2 * layers * tokens * heads * head_dim + layout.total_bytes
