"""Student blocks: one block that does the work of an adjacent pair."""

from pdtrim_deploy.pruning.students.store import Pair, Students

__all__ = ["Pair", "Students"]
