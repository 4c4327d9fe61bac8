"""Whether servers can serve, tested with real requests, because /health stays 200 when a transfer is broken."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable
from typing import Any

from pdtrim_deploy.serving.client import explain, get, post_json
from pdtrim_deploy.serving.ports import HOST
from pdtrim_deploy.serving.spec import WorkerSpec

# Two tokens: prefill computes the first, a decode step with the transferred KV the second.
REQUEST: dict[str, Any] = {
    "text": "Are you ready to serve?",
    "sampling_params": {"max_new_tokens": 2, "temperature": 0.0, "ignore_eos": True},
}


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Whether GET /health answers 200 now."""
    try:
        get(f"{url}/health", timeout_s)
    except OSError:
        return False
    return True


def complaint(url: str, timeout_s: float) -> str | None:
    """None when `url`/generate answers with two tokens, else one sentence about the failure."""
    return _generate(url, REQUEST, timeout_s)


class PairProbe:
    """One request to a prefill and a decode worker, as the router would send it; poll `result`."""

    def __init__(self, prefill: WorkerSpec, decode: WorkerSpec, timeout_s: float) -> None:
        self.name = f"{prefill.name} -> {decode.name}"
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._missing = 2
        room = {
            "bootstrap_host": HOST,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": secrets.randbits(63),
        }
        for worker in (prefill, decode):
            ask = _asker(self._answers, worker, REQUEST | room, timeout_s)
            threading.Thread(target=ask, daemon=True, name=f"probe {worker.name}").start()

    def result(self, wait_s: float) -> str | bool:
        """True when both workers answered well, False while they have not, a sentence once one answered badly."""
        while self._missing:
            try:
                bad = self._answers.get(timeout=wait_s)
            except queue.Empty:
                return False
            if bad is not None:
                return bad
            self._missing -= 1
        return True


def _asker(
    answers: queue.SimpleQueue[str | None], worker: WorkerSpec, body: dict[str, Any], timeout_s: float
) -> Callable[[], None]:
    def ask() -> None:
        bad = _generate(worker.url, body, timeout_s)
        answers.put(f"{worker.name} answered {bad}" if bad else None)

    return ask


def _generate(url: str, body: dict[str, Any], timeout_s: float) -> str | None:
    try:
        answer = post_json(f"{url}/generate", body, timeout_s)
    except OSError as error:
        return explain(error)
    except ValueError:
        return "something that is not JSON"
    tokens = answer.get("meta_info", {}).get("completion_tokens")
    return None if tokens else f"no token: {answer}"
