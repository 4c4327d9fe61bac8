"""Where TensorRT for RTX looks for itself when a network has a plugin."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from pdtrim_deploy.errors import UserError


def rtx_environment(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment for a fresh process that builds engines with plugins with tensorrt_rtx (1.7.1.116).

    Its builder opens `libtensorrt_rtx.so`; the wheel has only `libtensorrt_rtx.so.1`, and the process aborts
    ("terminate called without an active exception"). A link in `folder`, put on the loader's path, mends that and
    leaves site-packages alone. The loader reads its path once: an environment changed inside a process does nothing.

    Raises:
        UserError: tensorrt_rtx is not installed.

    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("tensorrt-rtx is not installed; run: pip install tensorrt-rtx==1.7.1.116")
    folder.mkdir(parents=True, exist_ok=True)
    link = folder.absolute() / "libtensorrt_rtx.so"
    if not link.exists():
        link.unlink(missing_ok=True)  # a link whose target went away
        link.symlink_to(Path(spec.submodule_search_locations[0]) / "libtensorrt_rtx.so.1")
    paths = [str(link.parent), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return {**environment, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
