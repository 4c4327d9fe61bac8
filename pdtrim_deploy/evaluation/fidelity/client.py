"""Asks the served pair, through its router, for greedy tokens with their logprobs (SGLang's `/generate`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.evaluation.fidelity.cases import Group

ABORT_AFTER_TOKENS = 2
OTHER = (ValueError, LookupError, TypeError, AttributeError)  # what reading another server's answer raises


@dataclass(frozen=True)
class Served:
    """What came back for one prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int


def ask(base_url: str, group: Group, new_tokens: int, deadline_s: float) -> list[Served]:
    """Send one group.

    Raises:
        UserError: a request failed, with the server's own words, or the answer is not that of a served pair.
        ServingError: nothing answers there, or not in time.

    """
    try:
        return asyncio.run(_ask(base_url, group, new_tokens, deadline_s))
    except httpx.TimeoutException:
        raise ServingError(
            f"{base_url} did not answer a fidelity request within {deadline_s:g} s; look into the logs of its workers, "
            "or give it longer: --deadline"
        ) from None
    except httpx.InvalidURL as error:
        raise UserError(f"{base_url} is not a URL such as http://127.0.0.1:8000 ({error})") from None
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise ServingError(f"{base_url} does not answer ({why}); give the URL of a router that runs") from None


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
        return [row for answers in rows for row in answers]


async def _generate(
    client: httpx.AsyncClient, prompts: Sequence[tuple[int, ...]], new_tokens: int, batch: bool = False
) -> list[Served]:
    reply = await client.post("/generate", json=_body([list(p) for p in prompts] if batch else prompts[0], new_tokens))
    if reply.status_code != 200:
        raise UserError(f"{client.base_url}: a fidelity request failed with {reply.status_code}: {reply.text[:500]}")
    try:
        data: Any = reply.json()
        return [_served(prompt, answer) for prompt, answer in zip(prompts, data if batch else [data], strict=True)]
    except OTHER:
        raise UserError(
            f"{client.base_url}: the answer to a fidelity request holds no token logprobs as SGLang gives them; give "
            "the URL of a pair's router"
        ) from None


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


def _served(prompt: tuple[int, ...], answer: Any) -> Served:
    scored = answer["meta_info"]["output_token_logprobs"]
    logprobs, tokens = zip(*((float(value), int(token)) for value, token, *_ in scored), strict=True)
    return Served(prompt, tokens, logprobs, answer["meta_info"].get("cached_tokens") or 0)
