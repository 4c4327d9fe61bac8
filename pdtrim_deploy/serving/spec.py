"""What to start: frozen, complete, and free of anything found out while running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.linear_states import StateDtype
from pdtrim_deploy.plan.wire import PoolDtype
from pdtrim_deploy.serving.engines import Engine, Executor
from pdtrim_deploy.serving.environment import gpu_count
from pdtrim_deploy.serving.gpu_defaults import PAGE_TOKENS
from pdtrim_deploy.serving.ports import HOST, free_ports, require_free
from pdtrim_deploy.serving.ranks import Placement, place
from pdtrim_deploy.worker.decode_pool import SplitPool

Stage = Literal["prefill", "decode"]
Role = Literal["prefill", "decode", "unified"]
"""What a worker does: one stage, or both, as SGLang does without disaggregation."""
Device = Literal["cpu", "cuda"]
STOP_S: Mapping[Device, float] = {"cpu": 10.0, "cuda": 25.0}
"""From a worker's SIGTERM to its SIGKILL, seconds.

SGLang 0.5.23 looks for SIGTERM every 5 s, then gives its schedulers 15 s (`managers/tokenizer_manager.py`,
`sigterm_watchdog`). A scheduler that is killed while it releases a GPU's memory may leave it allocated.
"""
SMALL_POOL_TOKENS, SMALL_REQUESTS = 8192, 16  # on a CPU, and where several pairs share GPUs


@dataclass(frozen=True)
class WorkerOptions:
    """What all workers of a cluster share.

    `page_size` (tokens a KV page), `max_total_tokens` (KV pool, tokens) and `max_running_requests` are None for the
    device's default: see `page_tokens`, `pool_tokens`, `requests`. `threads` are OpenMP threads a worker (CPU only;
    None: the cores divided among the workers). `sparse` says that decode has sparse layers, `split_pool` for which
    requests their pools are sized, `tail` that some layers of prefill run the last prompt tokens alone. `sinks`:
    attention has sinks; then SGLang refuses torch_native by name, and on a CPU without AMX chooses it all the same.
    `conv_dtype`: of linear attention's states. `send_by_layer`: rows of finished layers leave while prefill computes
    later ones. `tp_prefill` and `tp_decode` are tensor-parallel ranks of a worker; `share_gpus` lets several workers
    take one GPU where there are too few. Every answer names `plan_digest`, where it is given, as the version of the
    weights. `extra_args`, then those of the stage, go to `sglang.launch_server` last: they win over anything chosen
    here.
    """

    device: Device = field(default_factory=lambda: "cuda" if gpu_count() else "cpu")
    transfer_backend: str = "pdtrim_tcp"
    served_model_name: str = "pdtrim"
    page_size: int | None = None
    chunked_prefill_size: int | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    dtype: str = "auto"
    pool_dtype: PoolDtype = "native"
    enable_metrics: bool = True
    threads: int | None = None
    sparse: bool = False
    tail: bool = False
    sinks: bool = False
    conv_dtype: StateDtype | None = None
    split_pool: SplitPool | None = None
    send_by_layer: bool = False
    tp_prefill: int = 1
    tp_decode: int = 1
    share_gpus: bool = False
    plan_digest: str | None = None
    extra_args: tuple[str, ...] = ()
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()

    @classmethod
    def beside_others(cls, **chosen: Any) -> WorkerOptions:
        """For a pair that is up while other pairs are: on GPUs they share them, and none takes all of the memory."""
        return cls(**chosen, max_total_tokens=SMALL_POOL_TOKENS, max_running_requests=SMALL_REQUESTS, share_gpus=True)

    @property
    def page_tokens(self) -> int:
        """Tokens a KV page, in both stages."""
        return self.page_size or (1 if self.device == "cpu" else PAGE_TOKENS)

    @property
    def pool_tokens(self) -> int | None:
        """Tokens of a worker's KV pool; None: SGLang sizes it by the GPU's memory."""
        return self.max_total_tokens or (SMALL_POOL_TOKENS if self.device == "cpu" else None)

    @property
    def requests(self) -> int | None:
        """Requests that run at the same time in a worker; None: SGLang decides."""
        return self.max_running_requests or (SMALL_REQUESTS if self.device == "cpu" else None)

    def tp(self, role: Role) -> int:
        """Tensor-parallel ranks of a worker; of one that does both stages they are prefill's."""
        return self.tp_decode if role == "decode" else self.tp_prefill

    def arguments(self, role: Role) -> tuple[str, ...]:
        """The caller's own for `sglang.launch_server`, the stage's after those of both."""
        return (*self.extra_args, *{"prefill": self.prefill_args, "decode": self.decode_args}.get(role, ()))


@dataclass(frozen=True)
class WorkerSpec:
    """One SGLang worker. `index` counts within its `role`; `placement` says which GPUs are its, None on a CPU.

    `engine` computes its forward pass; None: SGLang's own torch model does. `transport` holds what its transport is
    told beside its name (`pdtrim_deploy.worker.transport`): sizes, deadlines, addresses.
    """

    role: Role
    index: int
    model_path: Path
    port: int
    bootstrap_port: int | None
    options: WorkerOptions
    engine: Engine | None = None
    transport: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement | None = None

    @property
    def name(self) -> str:
        """`prefill-0`, `decode-1`, `unified-0`."""
        return f"{self.role}-{self.index}"

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
    stop_timeout_s: float = STOP_S["cpu"]

    @property
    def prefill(self) -> tuple[WorkerSpec, ...]:
        """The prefill workers."""
        return tuple(worker for worker in self.workers if worker.role == "prefill")

    @property
    def decode(self) -> tuple[WorkerSpec, ...]:
        """The decode workers."""
        return tuple(worker for worker in self.workers if worker.role == "decode")

    @property
    def unified(self) -> tuple[WorkerSpec, ...]:
        """The workers that do both stages; where there are any, there are no others."""
        return tuple(worker for worker in self.workers if worker.role == "unified")

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
        gpus: int | None = None,
    ) -> ClusterSpec:
        """`prefill` + `decode` workers on free ports of this machine; `port` is the router's.

        `gpus` is how many GPUs there are for them; None: those of this machine.

        Raises:
            UserError: no worker of a stage, `port` is taken, or there are too few GPUs.

        """
        if prefill < 1 or decode < 1:
            raise UserError(f"--prefill {prefill} --decode {decode}: each stage needs at least one worker")
        models: dict[Role, tuple[Path, int]] = {"prefill": (prefill_model, prefill), "decode": (decode_model, decode)}
        return cls._of(models, port, options or WorkerOptions(), engines or {}, router_args, start_timeout_s, gpus)

    @classmethod
    def of_one_model(
        cls,
        model: Path,
        *,
        workers: int = 1,
        port: int | None = None,
        options: WorkerOptions | None = None,
        router_args: tuple[str, ...] = (),
        start_timeout_s: float = 600.0,
        gpus: int | None = None,
    ) -> ClusterSpec:
        """`workers` that do both stages, without disaggregation, behind a router; the rest is as `on_loopback`'s.

        Raises:
            UserError: no worker, `port` is taken, or there are too few GPUs.

        """
        if workers < 1:
            raise UserError(f"--workers {workers}: at least one is needed")
        models: dict[Role, tuple[Path, int]] = {"unified": (model, workers)}
        return cls._of(models, port, options or WorkerOptions(), {}, router_args, start_timeout_s, gpus)

    @classmethod
    def _of(
        cls,
        models: Mapping[Role, tuple[Path, int]],
        port: int | None,
        options: WorkerOptions,
        engines: Mapping[Stage, Engine | None],
        router_args: tuple[str, ...],
        start_timeout_s: float,
        gpus: int | None,
    ) -> ClusterSpec:
        """So many workers of each model on free ports of this machine, in this order."""
        taken = frozenset() if port is None else frozenset({require_free(port, "--port")})
        ports = iter(free_ports(2 * sum(count for _, count in models.values()) + 2, taken=taken))
        workers = [
            WorkerSpec(
                role,
                index,
                model.resolve(),
                next(ports),
                next(ports) if role == "prefill" else None,
                options,
                None if role == "unified" else engines.get(role),
            )
            for role, (model, count) in models.items()
            for index in range(count)
        ]
        if options.device == "cuda":
            ranks = [options.tp(worker.role) for worker in workers]
            placements = place(ranks, gpu_count() if gpus is None else gpus, options.share_gpus)
            workers = [
                replace(worker, placement=placement) for worker, placement in zip(workers, placements, strict=True)
            ]
        router = RouterSpec(port or next(ports), next(ports), extra_args=router_args)
        return cls(tuple(workers), router, start_timeout_s, STOP_S[options.device])
