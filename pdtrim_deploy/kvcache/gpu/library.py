"""Whether this process has the Triton form: Triton, and a driver that it can compile for."""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def library() -> ModuleType | None:
    """`gpu.move`; None, and one warning that says why, where it cannot run."""
    try:
        import triton

        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active.get_current_target()
        from pdtrim_deploy.kvcache.gpu import move
    except Exception as error:  # no module, no compiler for its launcher, no driver: each has its own kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("pdtrim: KV on the GPU is packed by torch's own operations, far slower: %s", reason)
        return None
    return move
