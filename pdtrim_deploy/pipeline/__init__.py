"""recipe -> plan -> stage checkpoints -> bundle, in steps that resume."""

from pdtrim_deploy.pipeline.build import build
from pdtrim_deploy.pipeline.build_steps import steps_of
from pdtrim_deploy.pipeline.context import Note

__all__ = ["Note", "build", "steps_of"]
