"""Whether workers fit this machine's memory, and which share of it SGLang may count on: on a CPU.

SGLang 0.5.23 makes a pool of as many tokens as fit into what is free once weights are loaded, less
`(1 - --mem-fraction-static)` of what was free before, and of at most --max-total-tokens. So the latter gives the pool
its size, and the fraction says what has to stay free beside it: what a batch needs while it runs. Workers start
together and see what the others take; hence all of them have to fit before the first one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.machine import memory, numa_nodes
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.quantized import with_quantization
from pdtrim_deploy.plan import NativeDtype
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.serving.spec import WorkerSpec
from pdtrim_deploy.worker.memory import CHUNK_TOKENS, WorkerMemory, worker_memory

FRACTION = "--mem-fraction-static"
_BOUNDS = (0.1, 0.99)  # SGLang refuses 0 and 1


def memory_of(worker: WorkerSpec) -> WorkerMemory | None:
    """Of a CPU worker; None where no config.json tells the model's size; SGLang will say what is wrong with it."""
    options, chunk = worker.options, worker.options.chunked_prefill_size
    body = worker.model_path / BODY  # loaded as a whole, whatever stays of it
    folders = [worker.model_path, *([body] if body.is_dir() else [])]
    try:
        configs = [with_quantization(folder, read_config(folder / "config.json")) for folder in folders]
    except UserError:
        return None
    dtype: NativeDtype = next((known for known in get_args(NativeDtype) if known == options.dtype), "float32")
    tokens, requests = options.pool_tokens or 0, options.requests or 0
    prefill_batch = CHUNK_TOKENS if chunk is None else chunk if chunk > 0 else tokens
    batch = requests if worker.role == "decode" else prefill_batch
    size, *bodies = (
        worker_memory(config, dtype, tokens, batch_tokens=batch, requests=requests, pool_dtype=options.pool_dtype)
        for config in configs
    )
    return replace(size, weights=size.weights + sum(other.weights for other in bodies))


def static_fraction(worker: WorkerSpec) -> float:
    """`--mem-fraction-static` that leaves a batch its memory, of what is free now."""
    estimate, (_, free) = memory_of(worker), memory()
    least, most = _BOUNDS
    if estimate is None or free <= 0:
        return most
    return round(min(most, max(least, 1 - estimate.activations * numa_nodes() / free)), 4)


def require_memory(workers: Sequence[WorkerSpec]) -> None:
    """UserError: `workers` do not fit together into what is free; not asked of those that are told a fraction."""
    nodes, sizes = numa_nodes(), dict[str, WorkerMemory]()
    for worker in workers:
        fraction_given = any(word.split("=")[0] == FRACTION for word in worker.options.arguments(worker.role))
        size = memory_of(worker) if worker.options.device == "cpu" and not fraction_given else None
        if size is not None:
            sizes[worker.name] = size
    _, free = memory()
    if (total := sum(size.total(nodes) for size in sizes.values())) <= free:
        return
    parts = "; ".join(f"{name} {_size_text(size, nodes)}" for name, size in sizes.items())
    raise UserError(
        f"the workers take about {_gb(total)} of memory and {_gb(free)} are free ({parts}); end other programs, start "
        f"fewer workers or lower --max-total-tokens; --worker-args '{FRACTION} 0.9' starts them all the same"
    )


def _size_text(size: WorkerMemory, nodes: int) -> str:
    parts = {"program": size.program, "weights": size.weights, "KV pool": size.pool, "a batch": size.activations}
    return f"{_gb(size.total(nodes))}: " + ", ".join(f"{name} {_gb(part)}" for name, part in parts.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
