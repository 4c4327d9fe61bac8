"""The cluster under test, what it holds, and the verdict on what a fault did to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
from client import Ended, Request, draw, send
from judge import wrong
from proxy import Proxy

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.serving import Cluster, ClusterSpec, Engine, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.metrics import scrape, total
from pdtrim_deploy.serving.probe import is_healthy
from pdtrim_deploy.serving.process import session_members

DEADLINE_S = 60.0
STALL_S = 4.0
POOL_TOKENS = 4096
STAGING_BYTES = 1 << 20
# What must be back at its level: SGLang's requests and pages (/v1/loads, which it writes whenever it falls idle; its
# gauge of them may be 30 s old), and what our plugin holds.
LOADS = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
LEVELS = ("pdtrim_kv_open_requests", "pdtrim_kv_staging_held_bytes", "pdtrim_kv_peers")
# A decode worker keeps a connection's two slots as large as their largest chunks were: bounded, not at its level.
BOUNDED, BUFFERS = "decode pdtrim_kv_staging_held_bytes", {"tcp": 2}  # one-sided: what is written into, and its copy


@dataclass(frozen=True)
class Stages:
    """A tiny bundle: `prefill` and `decode` in `folder`, an engine for prefill in `engine`."""

    folder: Path
    plan: PDPlan
    engine: Engine


@dataclass(frozen=True)
class Row:
    """One fault: what was asked under it, and how it ended; `grown`: what a soak's last third held over its first."""

    fault: str
    sent: int
    answered: int
    aborted: int
    failed: int
    lost: int
    wrong: int
    slowest_s: float
    reasons: dict[str, int]
    leaked: dict[str, float]
    afterwards_sent: int
    afterwards_answered: int
    recovered_s: float
    transport: str
    grown: dict[str, float] = field(default_factory=dict)


def tiny_stages(model: Path, folder: Path, cache, n_last: int) -> Stages:
    """Prefill loses a block, decode two; layers send unlike numbers of rows."""
    from pdtrim_builders import build_target

    checkpoint = open_checkpoint(model, cache)
    prefill, decode = (tuple(Drop() if block in gone else Keep() for block in range(6)) for gone in ((3,), (1, 3)))
    sparse = KVSend(mode="sparse", n_first=4, n_last=n_last)
    kv = (KVSend(), sparse, sparse.model_copy(update={"n_last": 9}), sparse)
    plan = PDPlan(model=checkpoint.shape("float32"), prefill=prefill, decode=decode, kv=kv)
    for stage in STAGES:
        write_stage(checkpoint, folder / stage, plan.layers(stage), "float32", plan.model_dump(mode="json"))
    build_target("onnx", folder / "prefill", folder / "engine")
    return Stages(folder, plan, Engine("onnxruntime", "prefill", folder / "engine"))


class Stand:
    """A pair behind a router, with a proxy between prefill and decode."""

    def __init__(
        self,
        stages: dict[str, Stages],
        logs: Path,
        ports: Sequence[int],
        rows: list[Row],
        transport: str = "tcp",
        environment: ServeEnvironment | None = None,
    ) -> None:
        self.stages, self.rows, self.transport = stages, rows, transport
        served = stages["one"]
        models = (load_model(served.folder / stage, "float32") for stage in STAGES)
        self.oracle = PDOracle(*models, served.plan)
        listens, announced = ports
        self.proxy = Proxy(announced, listens)
        options = WorkerOptions(
            dtype="float32", chunked_prefill_size=64, threads=1, max_total_tokens=POOL_TOKENS,
            max_running_requests=16, transfer_backend=f"pdtrim_{transport}",
        )  # fmt: skip
        spec = ClusterSpec.on_loopback(
            served.folder / "prefill", served.folder / "decode", options=options, start_timeout_s=600.0,
            router_args=("--health-check-interval-secs", "2"),
        )  # fmt: skip
        transport_options = {"stall_seconds": STALL_S, "connect_seconds": 2.0, "staging_bytes": STAGING_BYTES}
        transport_options |= {"accept_unauthenticated": True} if transport == "mooncake" else {}
        place = {"port": listens, "announce": f"127.0.0.1:{announced}"}
        workers = [
            replace(w, engine=served.engine, transport=transport_options)
            if w.stage == "prefill"
            else replace(w, transport=transport_options | place)
            for w in spec.workers
        ]
        self.cluster = Cluster(
            replace(spec, workers=tuple(workers)),
            environment or ServeEnvironment.find(),
            logs,
            lambda line: print(f"[{stamp()}] {line}"),
        )

    def __enter__(self) -> Stand:
        self.cluster.__enter__()
        self.healthy(1)
        self.level = self.held() | {BOUNDED: STAGING_BYTES * BUFFERS.get(self.transport, 4)}
        return self

    def __exit__(self, *error) -> None:
        self.cluster.stop()
        self.proxy.close()

    @property
    def url(self) -> str:
        return self.cluster.url

    def worker(self, stage: str):
        """The running worker of a stage."""
        return next(worker for worker in self.cluster.workers if worker.spec.stage == stage)

    def signal(self, stage: str, what: int) -> None:
        """To all processes of a worker, as a container's end does it."""
        for pid in session_members(self.worker(stage).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def signal_router(self, what: int) -> None:
        """To the router's process."""
        os.kill(self.cluster.router_pid, what)

    @contextlib.contextmanager
    def paused(self, stage: str, seconds: float) -> Iterator[None]:
        """Stopped (SIGSTOP) now, goes on after `seconds`, whatever happens inside."""
        self.signal(stage, signal.SIGSTOP)
        timer = threading.Timer(seconds, lambda: self.signal(stage, signal.SIGCONT))
        timer.start()
        try:
            yield
        finally:
            timer.join()

    def held(self) -> dict[str, float]:
        """What each worker holds now."""
        counts = {}
        for stage in STAGES:
            worker = self.worker(stage)
            (load,) = httpx.get(f"{worker.spec.url}/v1/loads", timeout=10, trust_env=False).json()["loads"]
            counts |= {f"{stage} {name}": load[name] for name in LOADS}
            samples = scrape(worker.metrics_url)
            counts |= {f"{stage} {name}": total(samples, name) for name in LEVELS}
        return counts

    def leaked(self, within_s: float = 30.0) -> dict[str, float]:
        """What is held beyond the level at the start, once it has had the time to go."""
        deadline = time.monotonic() + within_s
        while True:
            with contextlib.suppress(OSError, httpx.HTTPError):
                over = {name: now - self.level[name] for name, now in self.held().items() if now > self.level[name]}
                if not over or time.monotonic() > deadline:
                    return over
            if time.monotonic() > deadline:
                return {"no metrics": 1.0}
            time.sleep(0.5)

    def healthy(self, seed: int, count: int = 12) -> list[Ended]:
        """An ordinary load; every request must be answered, and rightly."""
        ended = send(self.url, draw(count, (2, 400), (2, 12), seed), DEADLINE_S)
        reasons = [outcome.reason for outcome in ended if outcome.reason]
        assert all(outcome.how == "answered" for outcome in ended), reasons
        assert not wrong(self.oracle, ended)
        return ended

    def recover(self, within_s: float = 60.0) -> float:
        """Seconds until the router answers again."""
        begun = time.monotonic()
        while True:
            (outcome,) = send(self.url, draw(1, (80, 80), (3, 3), 5), 20.0)
            if outcome.how == "answered":
                return time.monotonic() - begun
            assert time.monotonic() - begun < within_s, f"not serving again after {within_s:.0f} s: {outcome.reason}"
            time.sleep(0.5)

    def verdict(self, fault: str, ended: Sequence[Ended], recovered_s: float | None = None) -> Row:
        """Judge what was asked under the fault; then serve a healthy load, and look for what was left behind."""
        recovered = self.recover() if recovered_s is None else recovered_s
        hows = Counter(outcome.how for outcome in ended)
        after = send(self.url, draw(12, (2, 400), (2, 12), len(self.rows)), DEADLINE_S)
        row = Row(
            fault=fault, sent=len(ended), **{how: hows[how] for how in ("answered", "aborted", "failed", "lost")},
            wrong=len(wrong(self.oracle, [*ended, *after])),
            slowest_s=round(max((outcome.seconds for outcome in ended), default=0), 2),
            reasons=dict(Counter(short(outcome.reason) for outcome in ended if outcome.how == "failed")),
            leaked=self.leaked(), afterwards_sent=len(after),
            afterwards_answered=sum(outcome.how == "answered" for outcome in after),
            recovered_s=round(recovered, 2), transport=self.transport,
        )  # fmt: skip
        self.rows.append(row)
        print(f"[{stamp()}] {row}")
        assert not row.lost, [outcome.reason for outcome in ended if outcome.how == "lost"]
        assert not row.wrong, "served text is not the oracle's"
        assert all(outcome.reason for outcome in ended if outcome.how == "failed"), "a failure without a word"
        assert row.afterwards_answered == row.afterwards_sent, [outcome.reason for outcome in after if outcome.reason]
        assert not row.leaked, f"left behind after {fault}"
        return row

    def while_sending(
        self, requests: Sequence[Request], fault: Callable[[], None], when: Callable[[list[Ended]], bool]
    ) -> list[Ended]:
        """Send, and let the fault happen as soon as `when` says so of the requests begun: no clock knows the moment."""
        begun: list[Ended] = []
        over = threading.Event()

        def wait() -> None:
            while not over.is_set():
                if when(begun):
                    return fault()
                time.sleep(0.002)

        watching = threading.Thread(target=wait)
        watching.start()
        try:
            return send(self.url, requests, DEADLINE_S, begun=begun)
        finally:
            over.set()
            watching.join()

    def health(self, stage: str, timeout_s: float = 25.0) -> bool:
        """Whether the worker's own /health says yes."""
        return is_healthy(self.worker(stage).spec.url, timeout_s)


def streaming(begun: Sequence[Ended]) -> bool:
    """Whether some requests are in the middle of their text."""
    return sum(1 < len(outcome.tokens) < outcome.request.new_tokens for outcome in list(begun)) >= 4


def short(reason: str) -> str:
    """A reason without rooms, ports and digests, so that like ones are counted together."""
    own = reason.rpartition("KVTransferError(bootstrap_room=")[2]
    return re.sub(r"^\d+\): |\b[0-9a-f]{12,}\b|\b\d{4,}\b", "", own)[:160]


def stamp() -> str:
    """Now, for the log."""
    return time.strftime("%H:%M:%S")


def record(out: Path, rows: Sequence[Row]) -> None:
    """The table of faults."""
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
