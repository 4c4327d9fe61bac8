"""What a worker refuses its clients (SGLang answers 400): what would end it, or be answered with half of the truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST_TOP_LOGPROBS = 128  # sglang.srt.disaggregation.utils.MetadataBuffers of SGLang 0.5.23
LAST_ROOM = (1 << 64) - 1
WARM_UP_HOST = "2.2.2.2"  # FAKE_BOOTSTRAP_HOST there: requests of SGLang's own, which wait for no other worker


def bad_prompt(input_ids: Sequence[int], vocabulary: int) -> str | None:
    """What is wrong with a prompt, or nothing: no tokens, or one that the model has no embedding of, end a worker."""
    if not len(input_ids):
        return "the prompt has no tokens; give at least one"
    if min(input_ids) >= 0 and max(input_ids) < vocabulary:
        return None
    at, token = next((at, token) for at, token in enumerate(input_ids) if not 0 <= token < vocabulary)
    return f"prompt token {at} is {token}; valid ids are 0 to {vocabulary - 1}"


def bad_logprobs(start: int, alternatives: int, vocabulary: int) -> str | None:
    """What is wrong with the logprobs asked for, or nothing: SGLang's metadata row of a hand-over holds 128 a token."""
    if start < -1:
        return f"logprob_start_len is {start}; valid are -1 (the answer's alone) and positions in the prompt"
    most = min(MOST_TOP_LOGPROBS, vocabulary)
    return None if 0 <= alternatives <= most else f"{alternatives} top logprobs were asked for; valid are 0 to {most}"


def bad_room(room: int | None, host: str | None = None) -> str | None:
    """What is wrong with a room that came past the router, or nothing: SGLang's metadata row holds 64 bits.

    In it 0 means that nothing has come yet: decode would wait for ever, but in SGLang's warm-up, of another `host`.
    """
    first = 0 if host == WARM_UP_HOST else 1
    if room is None or first <= room <= LAST_ROOM:
        return None
    return f"bootstrap_room is {room}; valid are {first} to {LAST_ROOM}"


def shared_room(request: Any, states: Mapping[str, Any]) -> str | None:
    """What is wrong with a room that an earlier request still has, or nothing: each could get the other's KV.

    `states` are SGLang's `rid_to_state`, in the order in which the requests came; `request` is among them.
    """
    room = request.bootstrap_room
    if room is None or request.bootstrap_host == WARM_UP_HOST:
        return None
    for rid, state in states.items():
        if rid == request.rid:
            return None
        earlier = state.obj
        if getattr(earlier, "bootstrap_room", None) == room and earlier.bootstrap_host != WARM_UP_HOST:
            return f"bootstrap_room {room} is another request's, which has not ended; draw each at random"
    return None


def bad_stop_regex(patterns: str | Sequence[str] | None) -> str | None:
    """What is wrong with `stop_regex`, or nothing; SGLang itself answers 500, as if the worker were at fault."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            re.compile(pattern)
        except re.error as error:
            return f"stop_regex {pattern!r} is no regular expression: {error}"
    return None


def scored_echo(echo: bool, logprobs: int | None) -> str | None:
    """What is wrong with a completion request that wants its prompt back: only prefill has the prompt's logprobs."""
    if echo and logprobs is not None:
        return (
            "echo with logprobs is not supported here: the answer would carry the new tokens' logprobs without the "
            "prompt's; leave one of the two out, or ask /generate for return_logprob with logprob_start_len"
        )
    return None
