"""TensorRT engines of both stages, built here and served, with the library that their workers load beside them."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check, Figure, NotHere
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.serving import Executors
from pdtrim_tensorrt.plugin_library import build_library

HEADER = Path("include", "NvInfer.h")
ROOTS = ("/usr", "/usr/local/tensorrt")  # where NVIDIA's packages and archives put TensorRT's headers


def tensorrt_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """The builds of engines and of the library, then a tiny pair against the oracle."""
    bundle = lazily(folder / "bundle", CUT, targets={"tensorrt": {}})
    library = cache(lambda: built_library(folder / "library"))

    def engines() -> Figure:
        return {"engines": len(bundle().manifest.engines)}

    def served() -> Bundle:
        return with_library(bundle(), library())

    pair = pair or Pair(serve, executors=Executors("tensorrt", "tensorrt"))
    return [
        Check("TensorRT: build", engines, 10),
        Check("TensorRT: library", lambda: {"bytes": library().stat().st_size}, 10),
        fidelity_check("TensorRT: served", served, pair),
    ]


def built_library(folder: Path) -> Path:
    """libpdtrim_tensorrt.so for this machine's GPU.

    Raises:
        NotHere: TensorRT's headers, cmake or nvcc are not here.
        UserError: the compiler refused.

    """
    roots = [Path(root) for root in (os.environ.get("TENSORRT_ROOT"), *ROOTS) if root]
    root = next((root for root in roots if (root / HEADER).is_file()), None)
    if root is None:
        raise NotHere(f"no {HEADER} in {', '.join(map(str, roots))}: let TENSORRT_ROOT name TensorRT's folder")
    if missing := [program for program in ("cmake", "nvcc") if not shutil.which(program)]:
        raise NotHere(f"{' and '.join(missing)} must be on PATH to build the library that engines attend through")
    return build_library(root, folder, architectures="native")


def with_library(bundle: Bundle, library: Path) -> Bundle:
    """The bundle, with the library beside each engine, where the executor looks for it."""
    for engine in bundle.engines:
        shutil.copy(library, bundle.path / engine)
    return bundle
