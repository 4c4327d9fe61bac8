"""gpu-check's part of TensorRT: the library stands beside the engines before a pair starts, or the reason why not."""

from types import SimpleNamespace

import pytest
from pdtrim_tensorrt import engine_check

from pdtrim_deploy.gpucheck import bundles, pair
from pdtrim_deploy.gpucheck.checks import rows_of

ENGINES = ("engines/tensorrt/prefill", "engines/tensorrt/decode")


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """One whose engines were built."""
    path = tmp_path / "bundle"
    for engine in ENGINES:
        (path / engine).mkdir(parents=True)
    engines = dict.fromkeys(ENGINES)
    bundle = SimpleNamespace(path=path, engines=engines, manifest=SimpleNamespace(engines=engines))
    monkeypatch.setattr(bundles, "tiny_bundle", lambda *_, **__: bundle)
    return bundle


@pytest.fixture
def root(tmp_path, monkeypatch):
    """TensorRT's folder, with headers."""
    (tmp_path / "tensorrt/include").mkdir(parents=True)
    (tmp_path / "tensorrt/include/NvInfer.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "tensorrt"))
    monkeypatch.setattr(engine_check, "ROOTS", ())
    monkeypatch.setattr(engine_check.shutil, "which", lambda program: f"/bin/{program}")
    return tmp_path / "tensorrt"


def test_the_library_is_beside_both_engines_when_they_are_served(tmp_path, bundle, root, monkeypatch):
    builds, seen = [], []

    def build(tensorrt_root, folder, architectures):
        builds.append((tensorrt_root, architectures))
        folder.mkdir()
        (folder / "libpdtrim_tensorrt.so").write_bytes(b"library")
        return folder / "libpdtrim_tensorrt.so"

    def judged(served, *_):
        seen.extend((served.path / engine / "libpdtrim_tensorrt.so").read_bytes() for engine in ENGINES)
        return {}

    monkeypatch.setattr(engine_check, "build_library", build)
    monkeypatch.setattr(pair, "judged", judged)
    rows = list(rows_of(engine_check.tensorrt_checks(tmp_path, tmp_path)))
    assert [(row.part, row.status, row.reason) for row in rows] == [
        (f"TensorRT: {name}", "run", "") for name in ("build", "library", "served")
    ]
    assert rows[1].figure == {"bytes": 7}
    assert builds == [(root, "native")]
    assert seen == [b"library"] * 2


@pytest.mark.parametrize("lacking", ["headers", "nvcc"])
def test_without_headers_or_a_compiler_the_reason_is_said(tmp_path, bundle, root, monkeypatch, lacking):
    if lacking == "headers":
        (root / "include/NvInfer.h").unlink()
    else:
        monkeypatch.setattr(engine_check.shutil, "which", lambda program: None if program == "nvcc" else "/bin/cmake")
    build, library, served = rows_of(engine_check.tensorrt_checks(tmp_path, tmp_path))
    assert build.status == "run"
    for row in (library, served):
        assert row.status == "skipped"
        assert ("NvInfer.h" if lacking == "headers" else "nvcc must be on PATH") in row.reason
