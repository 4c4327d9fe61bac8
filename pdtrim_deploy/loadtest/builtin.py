"""The small driver: asyncio + httpx, streaming from SGLang's `/generate`; open and closed loops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

import httpx

from pdtrim_deploy.loadtest.base import LoadRun, Outcome
from pdtrim_deploy.loadtest.scenario import Scenario
from pdtrim_deploy.loadtest.schedule import Job, jobs

SLEEP_S = 0.02  # interval of the task that measures how late the client wakes


def check(scenario: Scenario) -> None:
    """Accept every scenario."""


def drive(url: str, scenario: Scenario, ended: Callable[[Outcome], None] = lambda outcome: None) -> LoadRun:
    """Put the load of `scenario` on `url`; failures of requests are outcomes, never exceptions.

    `ended` is called with each request of a closed loop when it has ended, before its client sends the next one.
    """
    return asyncio.run(_drive(url, scenario, ended))


async def _drive(url: str, scenario: Scenario, ended: Callable[[Outcome], None]) -> LoadRun:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        clients, warm = scenario.arrivals.clients, scenario.warming()
        if scenario.warmup:
            await _closed_loop(client, jobs(warm), warm.arrivals.clients or 1, scenario.deadline_s)
        pauses: list[float] = []
        watch = asyncio.create_task(_watch(pauses))
        started, cpu = time.perf_counter(), time.process_time()
        until = None if scenario.duration_s is None else started + scenario.duration_s
        if clients and scenario.trace is None:
            outcomes = await _closed_loop(client, jobs(scenario), clients, scenario.deadline_s, until, ended)
        else:
            outcomes = await _open_loop(client, jobs(scenario), scenario.deadline_s, started, until)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        watch.cancel()
        return LoadRun(tuple(outcomes), wall, cpu, tuple(pauses))


async def _closed_loop(
    client: httpx.AsyncClient,
    queue: Iterable[Job],
    clients: int,
    deadline_s: float,
    until: float | None = None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    waiting = iter(queue)

    async def worker() -> None:
        while until is None or time.perf_counter() < until:
            job = next(waiting, None)
            if job is None:
                return
            outcomes.extend(await _converse(client, job, deadline_s, until, ended))

    await asyncio.gather(*(worker() for _ in range(clients)))
    return outcomes


async def _open_loop(
    client: httpx.AsyncClient, queue: Iterable[Job], deadline_s: float, started: float, until: float | None
) -> list[Outcome]:
    """Send requests when they are due, whether or not earlier ones have ended."""

    async def send(job: Job, due: float) -> list[Outcome]:
        late = max(0.0, time.perf_counter() - due)
        first, *later = await _converse(client, job, deadline_s, until)
        return [replace(first, late=late), *later]

    sent = []
    for job in queue:
        due = started + (job.due_s or 0.0)
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        sent.append(asyncio.create_task(send(job, due)))
    return [outcome for outcomes in await asyncio.gather(*sent) for outcome in outcomes]


async def _watch(pauses: list[float]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            asleep = time.perf_counter()
            await asyncio.sleep(SLEEP_S)
            pauses.append(max(0.0, time.perf_counter() - asleep - SLEEP_S))


async def _converse(
    client: httpx.AsyncClient,
    job: Job,
    deadline_s: float,
    until: float | None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """A request, and the turns that follow it while each has its answer; none is sent after `until`."""
    outcomes, prompt = list[Outcome](), ""
    for turn, part in enumerate((job, *job.later)):
        prompt = f"{prompt}{outcomes[-1].text} {part.prompt}" if outcomes else part.prompt
        outcome = replace(await _request(client, replace(part, prompt=prompt), deadline_s), turn=turn)
        outcomes.append(outcome)
        ended(outcome)
        if outcome.failure is not None or (until is not None and time.perf_counter() >= until):
            break
    return outcomes


async def _request(client: httpx.AsyncClient, job: Job, deadline_s: float) -> Outcome:
    try:
        return await asyncio.wait_for(_stream(client, job.prompt, job.output_tokens), deadline_s)
    except TimeoutError:
        return Outcome("timeout", f"no last token within {deadline_s:g} s")
    except httpx.ConnectError as error:
        return Outcome("refused", str(error))
    except httpx.TransportError as error:
        return Outcome("disconnected", f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, TypeError, AttributeError, httpx.DecodingError) as error:
        return Outcome("error", f"unreadable reply: {error!r}")


async def _stream(client: httpx.AsyncClient, text: str, tokens: int) -> Outcome:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling, "stream": True}
    sent = last = time.perf_counter()
    ttft, gaps, seen, prompt_tokens, answer, done = 0.0, [], 0, 0, "", False
    async with client.stream("POST", "/generate", json=body) as reply:
        if reply.status_code != 200:
            return Outcome(f"http_{reply.status_code}", (await reply.aread()).decode(errors="replace")[:300])
        async for data in _events(reply):
            now = time.perf_counter()
            if data == b"[DONE]":
                done = True
                break
            event = json.loads(data)
            if "error" in event:
                return Outcome("error", str(event["error"])[:300])
            meta = event["meta_info"]
            if (meta.get("finish_reason") or {}).get("type") == "abort":
                return Outcome("error", str(meta["finish_reason"])[:300])
            new, prompt_tokens = meta["completion_tokens"] - seen, meta["prompt_tokens"]
            answer = event.get("text", "")  # the whole so far
            if new <= 0:
                continue
            if seen:
                gaps += [(now - last) / new] * new
            else:
                ttft = now - sent
                gaps += [0.0] * (new - 1)
            seen, last = seen + new, now
    if not done or seen < tokens:
        return Outcome("truncated", f"{seen} of {tokens} tokens, {'with' if done else 'no'} [DONE]")
    return Outcome(None, "", ttft, tuple(gaps), last - sent, prompt_tokens, seen, text=answer)


async def _events(reply: httpx.Response) -> AsyncIterator[bytes]:
    """What stands after `data:`. httpx's own lines also end at U+2028 and the like, which SGLang's JSON may hold."""
    rest = b""
    async for chunk in reply.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
