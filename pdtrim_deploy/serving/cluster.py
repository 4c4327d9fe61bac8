"""Workers and router as one thing: started together, serving when `with` enters its block, gone when it leaves."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.local.paths import resolved
from pdtrim_deploy.serving import commands, probe
from pdtrim_deploy.serving.environment import ServeEnvironment
from pdtrim_deploy.serving.memory import require_memory
from pdtrim_deploy.serving.ports import free_ports, is_free
from pdtrim_deploy.serving.process import ServerProcess, stop_all
from pdtrim_deploy.serving.spec import ClusterSpec, WorkerSpec

POLL_S = 0.2
GRACE_S = 5.0  # in which a worker ends whose connection broke, also on a busy machine
ROUTER_STOP_S = 2.0  # sglang-router 0.3.2 lingers at SIGTERM while a client keeps a connection open


@dataclass(frozen=True)
class RunningWorker:
    """A worker that serves."""

    spec: WorkerSpec
    log: Path
    pid: int

    @property
    def metrics_url(self) -> str:
        """Its Prometheus endpoint (404 unless metrics are enabled)."""
        return f"{self.spec.url}/metrics"


class Cluster:
    """Use it as a context manager, from a thread that outlives it.

    Raises on entering:
        UserError: the workers do not fit this machine's memory.

    Raises on entering and from `check` and `wait`:
        ServingError: a program died (which, why, and its last log lines), or did not serve by the deadline.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        environment: ServeEnvironment,
        log_dir: Path,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.spec, self.environment, self.log_dir, self._say = spec, environment, resolved(log_dir), say
        self._processes: dict[str, ServerProcess] = {}
        self._temporary: Path | None = None
        self.secret: Path | None = None  # the file that its workers share, while it runs

    @property
    def url(self) -> str:
        """The router's, for clients."""
        return self.spec.router.url

    @property
    def workers(self) -> tuple[RunningWorker, ...]:
        """The workers, prefill first."""
        running = [(spec, self._processes[spec.name]) for spec in self.spec.workers]
        return tuple(RunningWorker(spec, process.log, process.pid) for spec, process in running)

    @property
    def router_log(self) -> Path:
        """The router's log file."""
        return self._processes["router"].log

    @property
    def router_pid(self) -> int:
        """The router's process."""
        return self._processes["router"].pid

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def check(self) -> None:
        """Raise ServingError if a program has ended."""
        for process in self._processes.values():
            if process.exit_code() is not None:
                raise ServingError(process.obituary())

    def restart(self, name: str, spec: WorkerSpec | None = None) -> None:
        """End `router` or a worker, if it still runs, start it anew (as `spec` says) and wait until it serves.

        Raises:
            ServingError: as on entering; the other programs go on.

        """
        self._processes[name].finish(0.0)
        deadline = time.monotonic() + self.spec.start_timeout_s
        if name == "router":
            self._start_router(deadline)
            return
        new = spec or next(worker for worker in self.spec.workers if worker.name == name)
        self.spec = replace(self.spec, workers=tuple(new if w.name == name else w for w in self.spec.workers))
        self._start_worker(new)
        self._up(new, deadline)
        for prefill in self.spec.prefill:
            for decode in self.spec.decode:
                if new in (prefill, decode):
                    self._probe_pair(prefill, decode, deadline)
        self._say(f"{name} is up again at {new.url}")

    def wait(self) -> None:
        """Block until a program ends; always raises."""
        while True:
            self.check()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End every program, the router first; does nothing the second time."""
        processes, self._processes = self._processes, {}
        router = processes.pop("router", None)
        try:
            if router is not None:
                stop_all([router], min(ROUTER_STOP_S, self.spec.stop_timeout_s))
        finally:
            stop_all(processes.values(), self.spec.stop_timeout_s)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self) -> None:
        require_memory(self.spec.workers)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # A short path: SGLang's unix sockets lie in it, and their names are limited to 107 bytes.
        self._temporary = Path(tempfile.mkdtemp(prefix="pdtrim-"))
        deadline = time.monotonic() + self.spec.start_timeout_s
        self.secret = commands.write_secret(self._temporary)
        for worker in self.spec.workers:
            self._start_worker(worker)
            if worker.placement is not None and worker.placement.memory_fraction is not None:
                self._up(worker, deadline)  # the next one on its GPU takes a share of what this one leaves
        for worker in self.spec.workers:
            self._up(worker, deadline)
            self._say(f"{worker.name} is up at {worker.url}")
        for prefill in self.spec.prefill:
            for decode in self.spec.decode:
                self._probe_pair(prefill, decode, deadline)
        self._start_router(deadline)

    def _up(self, worker: WorkerSpec, deadline: float) -> None:
        self._until(lambda: probe.is_healthy(worker.url), deadline, worker.name)

    def _start_worker(self, worker: WorkerSpec) -> None:
        assert self._temporary is not None
        python, workers = self.environment.python, len(self.spec.workers)
        env = commands.worker_environment(python, worker, workers, self._temporary)
        self._launch(worker.name, commands.worker_command(python, worker, self.secret), env)

    def _start_router(self, deadline: float) -> None:
        assert self._temporary is not None
        python, router = self.environment.python, self.spec.router
        if not is_free(router.metrics_port):  # a worker has taken it since: SGLang chooses further ports by itself
            router = replace(router, metrics_port=free_ports(1, taken=frozenset({router.port}))[0])
            self.spec = replace(self.spec, router=router)
        env = commands.router_environment(python, self._temporary)
        self._launch("router", commands.router_command(python, self.spec), env)
        self._probe_router(deadline)
        self._say(f"the router serves at {self.url}")

    def _launch(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self._processes[name] = ServerProcess(name, command, env, self.log_dir / f"{name}.log")
        self._say(f"starting {name}, log in {self._processes[name].log}")

    def _until(self, ready: Callable[[], bool], deadline: float, name: str) -> None:
        while not ready():
            self.check()
            self._in_time(deadline, f"{name} was not ready", self._processes[name])
            time.sleep(POLL_S)

    def _probe_pair(self, prefill: WorkerSpec, decode: WorkerSpec, deadline: float) -> None:
        """A real request through one pair, past the router, so that every pair is known to work."""
        pair = probe.PairProbe(prefill, decode, max(1.0, deadline - time.monotonic()))
        while (result := pair.result(POLL_S)) is not True:
            self.check()
            if result:
                self._watch(GRACE_S)  # a worker that dies breaks its connections first, and its log says more
                logs = f"{self._processes[prefill.name].log} and {self._processes[decode.name].log}"
                raise ServingError(f"{pair.name} cannot serve: {result}; see {logs}")
            self._in_time(deadline, f"{pair.name} gave no token", self._processes[decode.name])

    def _watch(self, seconds: float) -> None:
        """Raise as soon as a program ends, and return when none has."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check()
            time.sleep(POLL_S)
        self.check()

    def _probe_router(self, deadline: float) -> None:
        """As many real requests as the role with most workers has: round robin reaches each of them."""
        for _ in range(max(len(self.spec.prefill), len(self.spec.decode), len(self.spec.unified))):
            left = max(1.0, deadline - time.monotonic())
            while (bad := probe.complaint(self.url, left)) is not None:  # it registers its workers meanwhile
                self.check()
                self._in_time(deadline, f"the router answered {bad}", self._processes["router"])
                time.sleep(POLL_S)

    def _in_time(self, deadline: float, problem: str, process: ServerProcess) -> None:
        if time.monotonic() > deadline:
            raise ServingError(f"{problem} within {self.spec.start_timeout_s:.0f} s; see its log {process.log}")
