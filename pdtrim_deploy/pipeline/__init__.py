"""recipe -> plan -> stage checkpoints -> bundle, in steps that resume."""

from pdtrim_deploy.pipeline.build import Note, build, steps_of

__all__ = ["Note", "build", "steps_of"]
