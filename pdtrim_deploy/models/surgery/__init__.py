"""Block surgery: a model with some of its blocks, and some of their experts, in memory and on disk."""

from pdtrim_deploy.models.surgery.checks import Replacements
from pdtrim_deploy.models.surgery.in_memory import keep_blocks
from pdtrim_deploy.models.surgery.on_disk import write_stage

__all__ = ["Replacements", "keep_blocks", "write_stage"]
