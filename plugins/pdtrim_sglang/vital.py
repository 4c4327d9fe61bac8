"""Threads without which a worker cannot serve: when one dies, the worker ends, and its /health says no.

SGLang's /health passes a token through the scheduler and tries no transfer: it would go on to say yes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pdtrim_sglang import sglang_host, threads

logger = logging.getLogger("sglang.srt.pdtrim.vital")


def start(name: str, run: Callable[[], None]) -> None:
    """Run it in a thread of its own; that `run` returns is no failure."""

    def watched() -> None:
        try:
            run()
        except Exception:
            logger.critical("pdtrim: this worker ends, since it cannot serve without its %s", name, exc_info=True)
            sglang_host.end_worker()

    threads.start(name, watched)
