"""The kernel part of the check on a GPU, where there is none; its bits run in tests/kvcache/interpreted.py."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from pdtrim_deploy.gpucheck import kernel_bits, kernel_inputs, kernel_speed, kernels
from pdtrim_deploy.gpucheck.checks import rows_of
from pdtrim_deploy.gpucheck.row import Row
from pdtrim_deploy.kvcache import torch_pack

CPU = torch.device("cpu")


def test_without_a_gpu_it_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(rows_of(kernels.kernel_checks())) == [Row("kernels", "skipped", "torch sees no CUDA device")]


def test_without_triton_it_is_skipped(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert list(rows_of(kernels.kernel_checks(CPU))) == [
        Row("kernels", "skipped", "Triton is not installed: pip install triton")
    ]


@pytest.mark.parametrize(
    ("knobs", "error", "reason"),
    [
        (True, RuntimeError("Failed to find C compiler"), "RuntimeError: Failed to find C compiler"),
        (False, None, "Triton 3.1.0 is too old: it needs 3.4 or later"),
    ],
)
def test_a_triton_that_cannot_compile_has_failed_in_one_row(monkeypatch, knobs, error, reason):
    class Driver:
        @property
        def active(self):
            raise error

    triton = SimpleNamespace(__version__="3.1.0", runtime=SimpleNamespace(driver=Driver()))
    if knobs:
        triton.knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(kernels, "find_spec", bool)
    monkeypatch.setattr(kernel_inputs, "library", lambda: None)
    first, *others = rows_of(kernels.kernel_checks(CPU))
    assert first == Row("kernels: Triton", "failed", reason)
    assert {(row.status, row.reason) for row in others} == {
        ("skipped", "Triton cannot run here: see the row kernels: Triton")
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("3 of 9 bytes differ"), "3 of 9 bytes differ"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "OutOfMemoryError: CUDA out of memory."),
        (ValueError(), "ValueError:"),
    ],
)
def test_a_check_that_raises_has_failed_and_the_others_go_on(monkeypatch, error, reason):
    def broken(*_):
        raise error

    monkeypatch.setattr(kernels, "find_spec", bool)
    monkeypatch.setattr(kernels, "triton_runs", dict)
    monkeypatch.setattr(kernels, "bits", lambda *_: {"bytes_different": 0})
    monkeypatch.setattr(kernels, "latent_bits", lambda *_: {"bytes_different": 0})
    monkeypatch.setattr(kernels, "bandwidth", broken)
    monkeypatch.setattr(kernels, "launches", broken)
    monkeypatch.setattr(kernels, "checksums", broken)
    rows = list(rows_of(kernels.kernel_checks(CPU)))
    assert {(row.status, row.reason) for row in rows} == {("run", ""), ("failed", reason)}
    assert len({row.part for row in rows}) == len(rows) == 6 * 3 + 4 * 2 + 5 + 6 * 2 + 1 + 1
    assert all((row.figure is None) == (row.status == "failed") for row in rows)


def test_what_compiles_most_comes_last_and_compiles_no_more_than_it_needs(monkeypatch):
    """A deadline takes bits of rare pools, not bandwidth and launches."""
    monkeypatch.setattr(kernels, "find_spec", bool)
    names = [check.name.removeprefix("kernels: ").partition(",")[0] for check in kernels.kernel_checks(CPU)]
    assert names == sorted(names, key=lambda name: name == "bits")
    assert set(names[: names.index("bits")]) == {"Triton", "bandwidth", "launches", "checksum"}


@pytest.mark.parametrize(("dtype", "sizes"), [("bfloat16", {64, 80, 96, 128, 256}), ("float16", {128})])
def test_all_head_sizes_are_compiled_from_bfloat16_alone(monkeypatch, dtype, sizes):
    compiled = []

    def on_device(device, layout, keys, values, here, offsets, packed):
        compiled.append(keys[0].shape[-1])
        pools = [torch.full_like(pool, -9) for pool in keys + values]
        torch_pack.unpack(layout, packed, pools[:3], pools[3:], here, offsets)
        return packed, pools

    monkeypatch.setattr(kernel_bits, "form", lambda: None)
    monkeypatch.setattr(kernel_bits, "_on_device", on_device)
    assert kernel_bits.bits(CPU, "int8", dtype, tokens=90)["bytes_different"] == 0
    assert set(compiled) == sizes


class Form:
    """Stands for `gpu.move`: by torch, on the CPU."""

    def move(self, layout, packed, keys, values, slots, offsets, *, pack):
        if pack:
            torch_pack.pack(layout, keys, values, slots, packed, offsets)
        else:
            torch_pack.unpack(layout, packed, keys, values, slots, offsets)
        return True


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernel_speed, "form", Form)
    monkeypatch.setattr(kernel_speed, "LLAMA", (2, 2, 64))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Clock:
    """torch.cuda.Event of a device on which everything takes 2 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 2.0


def test_bandwidth_is_of_all_bytes_read_and_written(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    figure = kernel_speed.bandwidth(CPU, "native", tokens=128, repeats=3)
    native = 128 * 2 * 2 * 2 * 64 * 2
    assert figure["bytes_read_and_written"] == 2 * native
    assert figure["pack_gb_per_s"] == pytest.approx(2 * native / 2e-3 / 1e9)
    assert (figure["pack_of_copy"], figure["unpack_of_copy"]) == (1, 1)
    assert kernel_speed.bandwidth(CPU, "int3", tokens=128, repeats=3)["bytes_read_and_written"] < 1.25 * native


def event(name, start, device=DeviceType.CPU):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=start + 10))


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        ([], (1, 0)),
        ([event("Memcpy HtoD (Pinned -> Device)", 9, DeviceType.CUDA)], (2, 0)),
        ([event("cudaStreamSynchronize", 4), event("cudaMemcpy", 5)], (1, 2)),
        ([event("cudaDeviceSynchronize", 30)], (1, 0)),  # the profiler's own, after the chunk
    ],
)
def test_operations_and_waits_are_counted(small, monkeypatch, more, counts):
    events = [event("pdtrim chunk", 0), event("pdtrim chunk", 0, DeviceType.CUDA), event("cuLaunchKernelEx", 3)]
    events += [event("pack_runs", 8, DeviceType.CUDA), *more]

    class Profiler:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    assert kernel_speed._profiled(lambda: None) == counts


def test_the_profilers_own_events_have_what_is_asked_of_them(small):
    assert kernel_speed._profiled(lambda: torch.zeros(3) + 1) == (0, 0)


def test_more_operations_than_two_have_failed(small, monkeypatch):
    monkeypatch.setattr(kernel_speed, "_profiled", lambda step: (3, 0))
    with pytest.raises(AssertionError, match="more than 2 operations on the GPU"):
        kernel_speed.launches(CPU, "fp8", tokens=128)
    monkeypatch.setattr(kernel_speed, "_profiled", lambda step: (2, 1))
    with pytest.raises(AssertionError, match="or a wait for it"):
        kernel_speed.launches(CPU, "fp8", tokens=128)
    monkeypatch.setattr(kernel_speed, "_profiled", lambda step: (2, 0))
    assert kernel_speed.launches(CPU, "fp8", tokens=128)["pack_new_operations"] == 2
