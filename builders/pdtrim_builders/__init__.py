"""Stage graph and its engine targets: `build_target(name, stage_dir, out_dir, options)`.

Slow imports (torch, onnx) wait until a target is built.
"""

from pdtrim_builders.base import TargetResult
from pdtrim_builders.registry import TARGETS, build_target, get_target

__all__ = ["TARGETS", "TargetResult", "build_target", "get_target"]
