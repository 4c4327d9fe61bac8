"""The cluster under test, what it holds, and the verdict on what a fault did to it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
from client import Ended, Request, draw, send
from judge import wrong
from paths import ServedPath, Stages
from proxy import Proxy
from slowworker import scheduler

from pdtrim_deploy.bundle.environment import environment as machine
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.metrics import scrape, total
from pdtrim_deploy.serving.ports import free_ports, is_free
from pdtrim_deploy.serving.probe import is_healthy
from pdtrim_deploy.serving.process import session_members

CHUNK = 64
DEADLINE_S = 60.0
WAITING_S, BOOTSTRAP_S = 20, 40  # SGLang's deadlines for a transfer, and for decode to ask for it
ROUTER_S = 64  # the router ends any request then; later than a client's own deadline, or it would hide what hangs
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
class Row:
    """One fault: what was asked under it, and how it ended; `grown`: what a soak's last third held over its first.

    `spread_nats`: of the logprobs of a prompt that was sent again and again.
    `path` is what served (paths.py), `commit` of which sources, `cpu` on what machine.
    """

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
    spread_nats: float | None = None
    path: str = ""
    commit: str | None = None
    cpu: str = ""


class Stand:
    """A pair behind a router, with a proxy between prefill and each rank of decode. `proxy` is the last rank's."""

    def __init__(
        self,
        path: ServedPath,
        stages: dict[str, Stages],
        logs: Path,
        rows: list[Row],
        transport: str = "tcp",
        environment: ServeEnvironment | None = None,
    ) -> None:
        self.path, self.stages, self.rows, self.transport = path, stages, rows, transport
        served = stages["one"]
        models = (load_model(served.folder / stage, "float32") for stage in STAGES)
        self.oracle = PDOracle(*models, served.plan)
        listens, announced = neighbours(path.tp_decode), neighbours(path.tp_decode)
        self.proxies = [Proxy(announced + rank, listens + rank) for rank in range(path.tp_decode)]
        self.proxy = self.proxies[-1]
        options = WorkerOptions(
            dtype="float32", chunked_prefill_size=CHUNK, threads=1, max_total_tokens=POOL_TOKENS,
            max_running_requests=16, transfer_backend=f"pdtrim_{transport}", tp_prefill=path.tp_prefill,
            tp_decode=path.tp_decode, page_size=path.page_size, decode_args=path.decode_args,
            send_by_layer=path.by_layer, pool_dtype=path.pool_dtype,
        )  # fmt: skip
        spec = ClusterSpec.on_loopback(
            served.folder / "prefill", served.folder / "decode", options=options, start_timeout_s=600.0,
            router_args=("--health-check-interval-secs", "2", "--request-timeout-secs", str(ROUTER_S)),
        )  # fmt: skip
        transport_options = {"stall_seconds": STALL_S, "connect_seconds": 2.0, "staging_bytes": STAGING_BYTES}
        transport_options |= {"part_bytes": 1} if path.by_layer else {}
        transport_options |= {"accept_unauthenticated": True} if transport == "mooncake" else {}
        place = {"port": listens, "announce": f"127.0.0.1:{announced}"}
        workers = [
            replace(w, engine=served.engine, transport=transport_options)
            if w.role == "prefill"
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
        bound = STAGING_BYTES * BUFFERS.get(self.transport, 4) * max(self.path.tp_prefill, self.path.tp_decode)
        self.level = self.held() | {BOUNDED: bound}
        return self

    def __exit__(self, *error) -> None:
        self.cluster.stop()
        for proxy in self.proxies:
            proxy.close()

    @property
    def url(self) -> str:
        return self.cluster.url

    def worker(self, stage: str):
        """The running worker of a stage."""
        return next(worker for worker in self.cluster.workers if worker.spec.role == stage)

    def signal(self, stage: str, what: int) -> None:
        """To all processes of a worker, as a container's end does it."""
        for pid in session_members(self.worker(stage).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def scheduler(self, stage: str, rank: int = 0) -> int:
        """The process that computes as that rank of a worker."""
        return scheduler(self.worker(stage).pid, rank)

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

    @contextlib.contextmanager
    def stopped(self, stage: str) -> Iterator[None]:
        """Stopped (SIGSTOP) inside."""
        self.signal(stage, signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(stage, signal.SIGCONT)

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
        reused, early = self.reused(), self.early()
        after = send(self.url, draw(12, (2, 400), (2, 12), len(self.rows)), DEADLINE_S)
        row = Row(
            fault=fault, sent=len(ended), **{how: hows[how] for how in ("answered", "aborted", "failed", "lost")},
            wrong=len(wrong(self.oracle, [*ended, *after])),
            slowest_s=round(max((outcome.seconds for outcome in ended), default=0), 2),
            reasons=dict(Counter(short(outcome.reason) for outcome in ended if outcome.how == "failed")),
            leaked=self.leaked(), afterwards_sent=len(after),
            afterwards_answered=sum(outcome.how == "answered" for outcome in after),
            recovered_s=round(recovered, 2), transport=self.transport, path=self.path.name,
            commit=revision(), cpu=processor(),
        )  # fmt: skip
        self.rows.append(row)
        print(f"[{stamp()}] {row}")
        assert not row.lost, [outcome.reason for outcome in ended if outcome.how == "lost"]
        assert not row.wrong, "served text is not the oracle's"
        assert all(outcome.reason for outcome in ended if outcome.how == "failed"), "a failure without a word"
        assert row.afterwards_answered == row.afterwards_sent, [outcome.reason for outcome in after if outcome.reason]
        assert not row.leaked, f"left behind after {fault}"
        assert self.reused() > reused or not self.path.reuses, "no prompt's rows were reused: this path was not taken"
        assert self.early() > early or not self.path.by_layer, "no rows left early: this path was not taken"
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

    def reused(self) -> float:
        """Tokens whose rows were not sent so far, because decode had them."""
        return total(scrape(self.worker("prefill").metrics_url), "pdtrim_kv_reused_tokens_sum")

    def early(self) -> float:
        """Bytes that have left so far before their forward pass had ended."""
        return total(scrape(self.worker("prefill").metrics_url), "pdtrim_kv_early_bytes_sum")

    def outcomes(self) -> Counter[str]:
        """How the transfers of prefill have ended so far; each of its ranks counts them."""
        counted: Counter[str] = Counter()
        for sample in scrape(self.worker("prefill").metrics_url).get("pdtrim_kv_requests_total", ()):
            counted[sample.labels["outcome"]] += int(sample.value)
        return counted

    def health(self, stage: str, timeout_s: float = 25.0) -> bool:
        """Whether the worker's own /health says yes."""
        return is_healthy(self.worker(stage).spec.url, timeout_s)


def streaming(begun: Sequence[Ended]) -> bool:
    """Whether some requests are in the middle of their text."""
    return sum(1 < len(outcome.tokens) < outcome.request.new_tokens for outcome in list(begun)) >= 4


def short(reason: str) -> str:
    """A reason without rooms, ports and digests, so that like ones are counted together."""
    text = reason.rpartition("KVTransferError(bootstrap_room=")[2]
    return re.sub(r"^\d+\): |\b[0-9a-f]{12,}\b|\b\d{4,}\b", "", text)[:160]


def neighbours(count: int) -> int:
    """The first of `count` free ports in a row."""
    while True:
        (port,) = free_ports(1)
        if all(is_free(port + place) for place in range(count)):
            return port


@functools.cache
def processor() -> str:
    """What this machine computes with."""
    return str(machine("")["machine"]["cpu"])


@functools.cache
def revision() -> str | None:
    """Commit of the sources, `-dirty` when some are not committed; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    sources = [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results"]
    return head.stdout.strip() + "-dirty" * bool(subprocess.run(sources, check=False).returncode)


def stamp() -> str:
    """Now, for the log."""
    return time.strftime("%H:%M:%S")


def record(out: Path, rows: Sequence[Row]) -> None:
    """The table of faults."""
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
