"""TensorRT engines of both stages, built here and served."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.serving import Executors


def tensorrt_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """The build, then a tiny pair against the oracle."""
    bundle = lazily(folder, CUT, targets={"tensorrt": {}})

    def built() -> Figure:
        return {"engines": len(bundle().manifest.engines)}

    pair = pair or Pair(serve, executors=Executors("tensorrt", "tensorrt"))
    return [Check("TensorRT: build", built, 10), fidelity_check("TensorRT: served", bundle, pair)]
