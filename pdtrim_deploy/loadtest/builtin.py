"""The small driver for smoke tests: asyncio + httpx, streaming from SGLang's `/generate`.

Prompts are seeded common English words. Nearly every BPE vocabulary has one token for each, so a prompt of n words
has about n tokens; what is reported is the server's own count.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import httpx

from pdtrim_deploy.loadtest.base import LoadRun, LoadSpec, Outcome

WORDS = """
the of and to in is was for that it with as his on be at by he this had not are but from or have an
they which one you were her all she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time these two may then do
first any my now such like our
""".split()  # noqa: SIM905


def drive(url: str, spec: LoadSpec) -> LoadRun:
    """Run the closed loop of `spec` against `url`; failures are outcomes, never exceptions."""
    return asyncio.run(_drive(url, spec))


def prompt(rng: random.Random, words: int) -> str:
    """Text of `words` words that no other draw begins with, so that the prefix cache gives nothing away."""
    return " ".join(rng.choices(WORDS, k=words))


async def _drive(url: str, spec: LoadSpec) -> LoadRun:
    rng = random.Random(spec.seed)
    jobs = [
        (prompt(rng, rng.randint(*spec.prompt_tokens)), rng.randint(*spec.output_tokens))
        for _ in range(spec.warmup + spec.requests)
    ]
    limits = httpx.Limits(max_connections=spec.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        await _closed_loop(client, jobs[: spec.warmup], spec)
        started = time.perf_counter()
        outcomes = await _closed_loop(client, jobs[spec.warmup :], spec)
        return LoadRun(tuple(outcomes), time.perf_counter() - started)


async def _closed_loop(client: httpx.AsyncClient, jobs: list[tuple[str, int]], spec: LoadSpec) -> list[Outcome]:
    outcomes: list[Outcome] = []
    queue = iter(jobs)

    async def worker() -> None:
        for text, tokens in queue:
            outcomes.append(await _request(client, text, tokens, spec.deadline_s))

    await asyncio.gather(*(worker() for _ in range(spec.concurrency)))
    return outcomes


async def _request(client: httpx.AsyncClient, text: str, tokens: int, deadline_s: float) -> Outcome:
    try:
        return await asyncio.wait_for(_stream(client, text, tokens), deadline_s)
    except TimeoutError:
        return Outcome("timeout", f"no last token within {deadline_s:g} s")
    except httpx.ConnectError as error:
        return Outcome("refused", str(error))
    except httpx.TransportError as error:
        return Outcome("disconnected", f"{type(error).__name__}: {error}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return Outcome("error", f"unreadable reply: {error!r}")


async def _stream(client: httpx.AsyncClient, text: str, tokens: int) -> Outcome:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling, "stream": True}
    sent = last = time.perf_counter()
    ttft, gaps, seen, prompt_tokens, done = 0.0, [], 0, 0, False
    async with client.stream("POST", "/generate", json=body) as reply:
        if reply.status_code != 200:
            return Outcome(f"http_{reply.status_code}", (await reply.aread()).decode(errors="replace")[:300])
        async for data in _events(reply):
            now = time.perf_counter()
            if data == "[DONE]":
                done = True
                break
            event = json.loads(data)
            if "error" in event:
                return Outcome("error", str(event["error"])[:300])
            meta = event["meta_info"]
            if (meta.get("finish_reason") or {}).get("type") == "abort":
                return Outcome("error", str(meta["finish_reason"])[:300])
            new, prompt_tokens = meta["completion_tokens"] - seen, meta["prompt_tokens"]
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
    return Outcome(None, "", ttft, tuple(gaps), last - sent, prompt_tokens, seen)


async def _events(reply: httpx.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()
