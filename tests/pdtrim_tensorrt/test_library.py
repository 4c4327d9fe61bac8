"""The C++ plugins, driven on the host as TensorRT drives them. Needs TensorRT's headers: TENSORRT_ROOT=DIR."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pdtrim_tensorrt.kernel import KERNEL_WIRE_DTYPES, SendKernel
from pdtrim_tensorrt.plugin_library import PluginLibrary, build_library

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.wire import packed_row_bytes

ROOT = os.environ.get("TENSORRT_ROOT")
TRT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7}
TRT_INT8 = 2
needs_headers = pytest.mark.skipif(
    not ROOT or not shutil.which("nvcc"), reason="needs TENSORRT_ROOT (TensorRT's headers) and the CUDA toolkit"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_library(Path(ROOT), tmp_path_factory.mktemp("library"), on_host=True)


@pytest.fixture(scope="session")
def driver(library):
    source, compiled = Path(__file__).with_name("drive_plugin.cpp"), library.with_name("libdriver.so")
    options = ["-std=c++17", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xlinker", f"-rpath,{library.parent}"]
    headers = ["-isystem", f"{ROOT}/include"]
    subprocess.run(
        ["nvcc", *options, *headers, str(source), str(library), "-o", str(compiled)], check=True
    )  # as g++, with CUDA
    return ctypes.CDLL(str(compiled))


def drive_send(driver, wire, pool, values, rows, staging, wide=True, width=None, declared=None):
    slots, heads, dim = pool.shape
    output = declared if declared is not None else (TRT_DTYPES[pool.dtype] if wire == "native" else TRT_INT8)
    formats = ctypes.c_bool()
    status = driver.drive_send(
        wire.encode() if wire else None,
        ctypes.c_int32(wide),
        ctypes.c_int64(heads),
        ctypes.c_int64(dim),
        TRT_DTYPES[pool.dtype],
        ctypes.c_int64(slots),
        ctypes.c_int64(width or heads * dim),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (pool, values, rows)),
        ctypes.c_int64(len(rows)),
        ctypes.c_void_p(staging.data_ptr()),
        ctypes.c_int64(staging.numel()),
        output,
        ctypes.byref(formats),
    )
    return status, formats.value


@needs_headers
@pytest.mark.parametrize("dtype", TRT_DTYPES)
@pytest.mark.parametrize("wire", KERNEL_WIRE_DTYPES)
@pytest.mark.parametrize("wide", [True, False])
def test_enqueue_writes_what_the_kernel_writes(library, driver, wire, dtype, wide):
    keys, values = (torch.randn(20, 3, 64).to(dtype) for _ in range(2))
    rows = torch.tensor([19, 0, 7, 7, 3])
    size = 2 * 5 * packed_row_bytes(wire, str(dtype).removeprefix("torch."), 3, 64)
    staging, expected = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    assert drive_send(driver, wire, keys, values, rows, staging, wide) == (0, True)
    SendKernel(library)(keys, values, rows, expected, wire_dtype=wire, reference=True)
    assert torch.equal(staging, expected)
    if wire == "native":
        assert torch.equal(staging.view(dtype).view(2, 5, 3, 64), torch.stack([keys[rows], values[rows]]))


@needs_headers
@pytest.mark.parametrize(
    ("wire", "dim", "message"),
    [
        ("int5", 64, "wire_dtype int5 is none of native, int8, fp8"),
        (None, 64, "attribute wire_dtype is missing"),
        ("fp8", 7, "int8 and fp8 need an even head_dim"),
    ],
)
def test_wrong_attributes_make_no_plugin(driver, capfd, wire, dim, message):
    pool = torch.randn(4, 2, dim)
    assert drive_send(driver, wire, pool, pool, torch.arange(2), torch.zeros(4096))[0] == -100
    assert message in capfd.readouterr().err


@needs_headers
def test_enqueue_refuses_a_width_that_is_not_the_heads(driver, capfd):
    pool, staging = torch.randn(4, 2, 8), torch.zeros(4096)
    status, _ = drive_send(driver, "native", pool, pool, torch.arange(2), staging, width=24)
    assert status != 0
    assert not staging.any()
    assert "not num_kv_heads * head_dim wide" in capfd.readouterr().err


def drive_attention(driver, dtype=torch.float16, stream=0x51, q=0x100, output=0x400):
    formats = ctypes.c_bool()
    status = driver.drive_attention(
        *(9, 6, 2, 16, ctypes.c_float(0.25), TRT_DTYPES[dtype], ctypes.c_int64(11)),
        *(ctypes.c_void_p(address) for address in (q, 0x200, 0x300, output, stream)),
        ctypes.byref(formats),
    )
    return status, formats.value


@needs_headers
@pytest.mark.parametrize("dtype", TRT_DTYPES)
def test_attention_reaches_the_registered_callback(library, driver, dtype):
    plugins, calls = PluginLibrary(library), []
    plugins.set_attention(calls.append)
    try:
        assert drive_attention(driver, dtype) == (0, True)
    finally:
        plugins.clear_attention()
    (call,) = calls
    assert (call.q, call.k, call.v, call.output, call.stream) == (0x100, 0x200, 0x300, 0x400, 0x51)
    assert (call.layer_id, call.tokens, call.scale) == (9, 11, 0.25)
    assert (call.width, call.num_heads, call.num_kv_heads, call.head_dim) == (96, 6, 2, 16)
    assert call.dtype == str(dtype).removeprefix("torch.")


def drive_write(driver, dtype=torch.float16, hidden=0x100, output=0x400):
    formats = ctypes.c_bool()
    status = driver.drive_write(
        *(7, 2, 16, ctypes.c_int64(72), TRT_DTYPES[dtype], ctypes.c_int64(11)),
        *(ctypes.c_void_p(address) for address in (hidden, 0x200, 0x300, output, 0x51)),
        ctypes.byref(formats),
    )
    return status, formats.value


@needs_headers
def test_a_write_of_kv_reaches_the_same_callback(library, driver):
    plugins, calls = PluginLibrary(library), []
    plugins.set_attention(calls.append)
    try:
        assert drive_write(driver) == (0, True)
    finally:
        plugins.clear_attention()
    (call,) = calls
    assert (call.q, call.k, call.v, call.output, call.stream) == (0x100, 0x200, 0x300, 0x400, 0x51)
    assert (call.layer_id, call.tokens, call.width) == (7, 11, 72)
    assert (call.num_heads, call.num_kv_heads, call.head_dim) == (0, 2, 16)


@needs_headers
def test_attention_without_a_callback_or_with_one_that_raises(library, driver, capfd):
    plugins = PluginLibrary(library)
    assert drive_attention(driver)[0] != 0
    assert "no runtime has registered its attention" in capfd.readouterr().err

    def attend(_):
        raise KeyError("layer 9")

    plugins.set_attention(attend)
    try:
        assert drive_attention(driver)[0] != 0
    finally:
        plugins.clear_attention()
    assert isinstance(plugins.error, KeyError)
    assert drive_attention(driver)[0] != 0  # cleared: refused again


@pytest.fixture
def timing(driver):
    """The driver acts as a builder that times plugins."""
    driver.drive_timing(ctypes.c_bool(True))
    yield driver
    driver.drive_timing(ctypes.c_bool(False))


@needs_headers
@pytest.mark.parametrize("dtype", TRT_DTYPES)
@pytest.mark.parametrize(("drive", "pointer", "width"), [(drive_attention, "q", 96), (drive_write, "hidden", 72)])
def test_a_builder_times_a_copy_of_the_first_input(library, timing, drive, pointer, width, dtype):
    """K and V have no memory here; a runtime in the same process is not called."""
    plugins, calls = PluginLibrary(library), []
    first, output = torch.randn(11, width).to(dtype), torch.zeros(12, width, dtype=dtype)
    for attend in (None, calls.append):
        if attend:
            plugins.set_attention(attend)
        try:
            assert drive(timing, dtype, output=output.data_ptr(), **{pointer: first.data_ptr()}) == (0, True)
        finally:
            plugins.clear_attention()
        assert torch.equal(output[:11], first)
        assert not output[11].any()
        output.zero_()
    assert calls == []


@needs_headers
@pytest.mark.parametrize("wire", KERNEL_WIRE_DTYPES)
def test_a_builder_times_a_send_that_reads_no_rows(timing, wire):
    """Its rows are made up: to follow them would read anywhere."""
    pool, rows = torch.randn(20, 3, 64).half(), torch.full((5,), 1 << 50)
    size = 2 * 5 * packed_row_bytes(wire, "float16", 3, 64)
    staging = torch.full((size + 16,), 7, dtype=torch.uint8)
    assert drive_send(timing, wire, pool, pool, rows, staging[:size]) == (0, True)
    assert not staging[:size].any()
    assert torch.equal(staging[size:], torch.full((16,), 7, dtype=torch.uint8))


@needs_headers
def test_it_compiles_for_gpus(tmp_path):
    library = build_library(Path(ROOT), tmp_path)
    assert ctypes.CDLL(str(library)).getCreators


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
def test_no_headers_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match=r"has no\s+include/NvInfer\.h: give -DTENSORRT_ROOT=DIR"):
        build_library(tmp_path / "nothing", tmp_path / "build")
