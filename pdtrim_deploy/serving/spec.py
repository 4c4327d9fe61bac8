"""What to start: frozen, complete, and free of anything found out while running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.engines import Engine, Executor
from pdtrim_deploy.serving.environment import gpu_count
from pdtrim_deploy.serving.ports import HOST, free_ports, require_free
from pdtrim_deploy.worker.decode_pool import SplitPool

Stage = Literal["prefill", "decode"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class WorkerOptions:
    """What all workers of a cluster share.

    `threads` are OpenMP threads a worker (CPU only; None: the cores divided among the workers). `sparse` says that
    decode has sparse layers, `split_pool` for which requests their pools are sized. `extra_args` go to
    `sglang.launch_server` last: they win over anything chosen here.
    """

    device: Device = field(default_factory=lambda: "cuda" if gpu_count() else "cpu")
    transfer_backend: str = "pdtrim_tcp"
    served_model_name: str = "pdtrim"
    page_size: int = 1
    chunked_prefill_size: int | None = None
    max_total_tokens: int = 8192
    max_running_requests: int = 16
    dtype: str = "auto"
    enable_metrics: bool = True
    threads: int | None = None
    sparse: bool = False
    split_pool: SplitPool | None = None
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerSpec:
    """One SGLang worker. `index` counts within its stage, `slot` over all workers (it chooses the GPU).

    `engine` computes its forward pass; None: SGLang's own torch model does. `transport` holds what its transport is
    told beside its name (`pdtrim_deploy.worker.transport`): sizes, deadlines, addresses.
    """

    stage: Stage
    index: int
    slot: int
    model_path: Path
    port: int
    bootstrap_port: int | None
    options: WorkerOptions
    engine: Engine | None = None
    transport: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`prefill-0`, `decode-1`."""
        return f"{self.stage}-{self.index}"

    @property
    def executor(self) -> Executor:
        """What computes its forward pass."""
        return self.engine.executor if self.engine else "torch"

    @property
    def url(self) -> str:
        """Where it answers HTTP."""
        return f"http://{HOST}:{self.port}"


@dataclass(frozen=True)
class RouterSpec:
    """The router. `request_timeout_s` ends a request that a stuck worker would hold (SGLang's default: 30 min)."""

    port: int
    metrics_port: int
    policy: str = "round_robin"
    request_timeout_s: int = 600
    extra_args: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{HOST}:{self.port}"

    @property
    def metrics_url(self) -> str:
        """Its Prometheus endpoint."""
        return f"http://{HOST}:{self.metrics_port}/metrics"


@dataclass(frozen=True)
class ClusterSpec:
    """Workers and router; `start_timeout_s` bounds the time to the first real answers, `stop_timeout_s` SIGTERM's."""

    workers: tuple[WorkerSpec, ...]
    router: RouterSpec
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 10.0

    @property
    def prefill(self) -> tuple[WorkerSpec, ...]:
        """The prefill workers."""
        return tuple(worker for worker in self.workers if worker.stage == "prefill")

    @property
    def decode(self) -> tuple[WorkerSpec, ...]:
        """The decode workers."""
        return tuple(worker for worker in self.workers if worker.stage == "decode")

    @classmethod
    def on_loopback(
        cls,
        prefill_model: Path,
        decode_model: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        port: int | None = None,
        options: WorkerOptions | None = None,
        engines: Mapping[Stage, Engine | None] | None = None,
        router_args: tuple[str, ...] = (),
        start_timeout_s: float = 600.0,
    ) -> ClusterSpec:
        """`prefill` + `decode` workers on free ports of this machine; `port` is the router's.

        Raises:
            UserError: no worker of a stage, or `port` is taken.

        """
        if prefill < 1 or decode < 1:
            raise UserError(f"--prefill {prefill} --decode {decode}: each stage needs at least one worker")
        options, engines = options or WorkerOptions(), engines or {}
        given = frozenset() if port is None else frozenset({require_free(port, "--port")})
        ports = iter(free_ports(2 * prefill + decode + 2, taken=given))
        engine = engines.get("prefill")
        workers = [
            WorkerSpec("prefill", i, i, prefill_model.resolve(), next(ports), next(ports), options, engine)
            for i in range(prefill)
        ]
        engine = engines.get("decode")
        workers += [
            WorkerSpec("decode", i, prefill + i, decode_model.resolve(), next(ports), None, options, engine)
            for i in range(decode)
        ]
        router = RouterSpec(port or next(ports), next(ports), extra_args=router_args)
        return cls(tuple(workers), router, start_timeout_s)
