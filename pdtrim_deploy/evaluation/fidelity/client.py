"""Asks the served pair, through its router, for greedy tokens with their logprobs (SGLang's `/generate`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.fidelity.cases import Group

ABORT_AFTER_TOKENS = 2


@dataclass(frozen=True)
class Served:
    """What came back for one prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int


def ask(base_url: str, group: Group, new_tokens: int, deadline_s: float) -> list[Served]:
    """Send one group; UserError when a request fails, with the server's own words."""
    return asyncio.run(_ask(base_url, group, new_tokens, deadline_s))


async def _ask(base_url: str, group: Group, new_tokens: int, deadline_s: float) -> list[Served]:
    async with httpx.AsyncClient(base_url=base_url, timeout=deadline_s, trust_env=False) as client:
        if group.aborts:
            await asyncio.gather(*(_abort(client, prompt) for prompt in group.aborts))
        if group.how == "one batch":
            return await _generate(client, group.prompts, new_tokens, batch=True)
        if group.how == "in turn":
            rows = [await _generate(client, (prompt,), new_tokens) for prompt in group.prompts]
        else:
            rows = await asyncio.gather(*(_generate(client, (prompt,), new_tokens) for prompt in group.prompts))
        return [row for found in rows for row in found]


async def _generate(
    client: httpx.AsyncClient, prompts: Sequence[tuple[int, ...]], new_tokens: int, batch: bool = False
) -> list[Served]:
    reply = await client.post("/generate", json=_body([list(p) for p in prompts] if batch else prompts[0], new_tokens))
    if reply.status_code != 200:
        raise UserError(f"{client.base_url}: a fidelity request failed with {reply.status_code}: {reply.text[:500]}")
    data: Any = reply.json()
    return [_served(prompt, one) for prompt, one in zip(prompts, data if batch else [data], strict=True)]


async def _abort(client: httpx.AsyncClient, prompt: tuple[int, ...]) -> None:
    """Begin a stream and hang up after its first events."""
    body = _body(prompt, 200) | {"stream": True}
    async with client.stream("POST", "/generate", json=body) as reply:
        events = 0
        async for line in reply.aiter_lines():
            events += line.startswith("data:")
            if events >= ABORT_AFTER_TOKENS:
                return


def _body(input_ids: Any, new_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True}


def _served(prompt: tuple[int, ...], one: Any) -> Served:
    scored = one["meta_info"]["output_token_logprobs"]
    tokens, logprobs = tuple(token for _, token, *_ in scored), tuple(value for value, *_ in scored)
    return Served(prompt, tokens, logprobs, one["meta_info"].get("cached_tokens") or 0)
