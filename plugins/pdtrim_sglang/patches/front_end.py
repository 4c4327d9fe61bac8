"""Hooks around clients' requests: samples in rooms of their own, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdtrim_sglang import hook_targets, sglang_host


def is_ours() -> bool:
    return str(sglang_host.server_arguments().disaggregation_transfer_backend).startswith("pdtrim_")


def spread_samples(_: None, request: Any) -> None:
    if is_ours():
        from pdtrim_sglang.samples import spread_samples

        spread_samples(request)


def check_front_end(_: None, tokenizer_manager: Any, **__: Any) -> None:
    if is_ours():
        hook_targets.check()


def refuse_request(original: Callable[..., None], manager: Any, request: Any, input_ids: Any) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from pdtrim_sglang.clients import bad_logprobs, bad_prompt, bad_room, bad_stop_regex, shared_room

    original(manager, request, input_ids)
    if sglang_host.server_arguments().disaggregation_mode == "null":
        return
    vocabulary = manager.model_config.vocab_size
    if input_ids is None:  # the two stages would not agree on the prompt, and wait for each other
        raise ValueError("prompts of embeddings are not supported here; give text or token ids")
    problem = bad_prompt(input_ids, vocabulary)
    if isinstance(request, GenerateReqInput):
        problem = problem or bad_logprobs(request.logprob_start_len, request.top_logprobs_num, vocabulary)
        problem = problem or bad_room(request.bootstrap_room, request.bootstrap_host)
        problem = problem or shared_room(request, manager.rid_to_state)
        problem = problem or bad_stop_regex(request.sampling_params.get("stop_regex"))
    if problem:
        raise ValueError(problem)  # SGLang answers 400


def refuse_completion(original: Callable[..., str | None], serving: Any, request: Any) -> str | None:
    from pdtrim_sglang.clients import scored_echo

    problem = original(serving, request)
    if problem or sglang_host.server_arguments().disaggregation_mode == "null":
        return problem
    return scored_echo(request.echo, request.logprobs)
