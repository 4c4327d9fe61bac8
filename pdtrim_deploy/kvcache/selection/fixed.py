"""The two ends: every layer whole, every layer cut."""

from __future__ import annotations

from pdtrim_deploy.kvcache.selection.base import Progress, Request
from pdtrim_deploy.plan import KVSend


class AllFull:
    """Nothing is cut; the request's sizes are ignored."""

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """All layers full."""
        return request.sends(())


class AllSparse:
    """Everything is cut, as StreamingLLM (arXiv:2309.17453) does; `sparse_layers` is ignored."""

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """All layers sparse."""
        return request.sends(range(request.layers))
