"""Many requests at once, each with a deadline, and how each of them ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import httpx

TEXTS = [tuple(random.Random(name).choices(range(3, 259), k=2000)) for name in "abc"]


@dataclass(frozen=True)
class Request:
    """One request; its client hangs up after `abort_after` tokens (0: before the first one), or when `hangs_up`."""

    prompt: tuple[int, ...]
    new_tokens: int
    abort_after: int | None = None
    hangs_up: Callable[[], bool] | None = None


@dataclass
class Ended:
    """`how`: answered, failed (with a reason), aborted (by us) or lost (nothing by the deadline)."""

    request: Request
    how: str = "lost"
    reason: str = ""
    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def draw(count: int, tokens: tuple[int, int], new_tokens: tuple[int, int], seed: int, aborts: float = 0.0):
    """`count` requests of random text; every one that shall be aborted is, after a few tokens.

    Half of them begin as others do, whatever the seed: their rows may be known.
    """
    dice = random.Random(seed)
    requests = []
    for _ in range(count):
        prompt = tuple(dice.randrange(3, 259) for _ in range(dice.randint(*tokens)))
        if dice.random() < 0.5:
            shared = dice.randint(0, len(prompt))
            prompt = (*dice.choice(TEXTS)[:shared], *prompt[shared:])
        new = dice.randint(*new_tokens)
        requests.append(Request(prompt, new, dice.randrange(0, max(1, new - 1)) if dice.random() < aborts else None))
    return requests


def send(
    url: str, requests: Sequence[Request], deadline_s: float, concurrency: int = 8, begun: list[Ended] | None = None
) -> list[Ended]:
    """All of them, `concurrency` at a time; returns when each has ended, or its deadline has passed.

    `begun` is given each request as it is sent, for who wants to look on from another thread.
    """
    return asyncio.run(_send(url, requests, deadline_s, concurrency, [] if begun is None else begun))


async def _send(
    url: str, requests: Sequence[Request], deadline_s: float, concurrency: int, sent: list[Ended]
) -> list[Ended]:
    gate = asyncio.Semaphore(concurrency)
    # a connection each: a kept one that the router has closed meanwhile would be the client's own fault
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, limits=limits) as client:

        async def complete(request: Request) -> Ended:
            async with gate:
                ended, begun = Ended(request), time.monotonic()
                sent.append(ended)
                try:
                    async with asyncio.timeout(deadline_s):
                        ended.how, ended.reason = await _unless(_stream(client, ended), request.hangs_up)
                except TimeoutError:
                    ended.how, ended.reason = "lost", f"nothing within {deadline_s:.0f} s"
                except httpx.HTTPError as error:
                    ended.how, ended.reason = "failed", f"{type(error).__name__}: {error}"
                ended.seconds = time.monotonic() - begun
                return ended

        return await asyncio.gather(*(complete(request) for request in requests))


async def _unless(
    stream: Coroutine[None, None, tuple[str, str]], hangs_up: Callable[[], bool] | None
) -> tuple[str, str]:
    """How the stream ends, unless its client hangs up before."""
    task = asyncio.ensure_future(stream)
    try:
        while not (await asyncio.wait({task}, timeout=0.005 if hangs_up else None))[0]:
            if hangs_up is not None and hangs_up():
                return "aborted", ""
        return task.result()
    finally:
        task.cancel()


async def _stream(client: httpx.AsyncClient, ended: Ended) -> tuple[str, str]:
    request = ended.request
    sampling = {"max_new_tokens": request.new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": request.prompt, "sampling_params": sampling, "return_logprob": True, "stream": True}
    done = False
    async with client.stream("POST", "/generate", json=body) as reply:
        if reply.status_code != 200:
            return "failed", f"HTTP {reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}"
        if request.abort_after == 0:
            return "aborted", ""
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return "failed", str(event["error"])[:300]
                meta = event["meta_info"]
                if (meta.get("finish_reason") or {}).get("type") == "abort":
                    return "failed", str(meta["finish_reason"].get("message"))[:300]
                scored = meta["output_token_logprobs"]
                ended.tokens = [token for _, token, *_ in scored]
                ended.logprobs = [value for value, *_ in scored]
                if request.abort_after is not None and len(ended.tokens) >= request.abort_after:
                    return "aborted", ""
    if len(ended.tokens) == request.new_tokens and done:
        return "answered", ""
    return "failed", f"the stream ended after {len(ended.tokens)} of {request.new_tokens} tokens, [DONE]: {done}"
