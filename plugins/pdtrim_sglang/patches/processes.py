"""Hooks around the start of a worker's processes: on a CPU they are forked, not spawned.

SGLang spawns its scheduler and its detokenizer, because CUDA does not survive a fork. A spawned process imports torch,
transformers and SGLang anew: 10 s of CPU and 0.5 GB each. A forked one shares the launcher's. A fork is safe while the
launcher has one thread, as no other can hold a lock; otherwise, and on a GPU, the processes are spawned.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdtrim_sglang import sglang_host

THREADS = Path("/proc/self/task")


def fork_on_cpu(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`launch(*args, **kwargs)`: a method of SGLang's Engine, whose module takes processes and pipes from its `mp`."""
    from sglang.srt.entrypoints import engine

    if not may_fork():
        return launch(*args, **kwargs)
    original = engine.mp
    engine.mp = multiprocessing.get_context("fork")
    try:
        return launch(*args, **kwargs)
    finally:
        engine.mp = original


def may_fork() -> bool:
    """Whether this process serves on a CPU, has one thread, and starts its children without numactl."""
    arguments = sglang_host.server_arguments()
    if arguments.device != "cpu" or arguments.numa_node is not None:
        return False
    return THREADS.is_dir() and len(list(THREADS.iterdir())) == 1
