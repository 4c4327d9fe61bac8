"""The n samples of a prompt as n requests, each in a bootstrap room of its own.

SGLang 0.5.23 gives all samples of a prompt its one room, and computes the prompt once more before them, to have it in
the prefix cache: in that room, too. Here a worker's front end makes a list of prompts out of `n`, as the client could
have sent it. Prefill and decode get the same body, so both derive the same rooms in the same order; nothing else is
agreed on, and no request is without its other half. Samples that prefill computes in one chunk share no prefix, later
ones hit the cache: `n` costs one chunk of prefill more at most.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ROOMS = 1 << 63  # the router draws rooms below it at random
STEP = 0x1E3779B97F4A7C15  # odd, so that no two samples of a prompt meet; large, so that none meets the next prompt's


def sample_room(room: int, sample: int) -> int:
    """Where the `sample`-th answer to the prompt of `room` travels, from 0: the first in `room` itself."""
    return (room + sample * STEP) % ROOMS if sample else room


def spread_samples(request: Any) -> None:
    """Make `n` samples of each prompt of a GenerateReqInput that SGLang has normalised into requests of one sample.

    They stand prompt by prompt, the order in which SGLang answers. Without rooms (a request that came past the router)
    or with one sample nothing changes.

    Raises:
        ValueError: fewer than one sample is asked for; SGLang answers 400 with its text.

    """
    samples, prompts = request.parallel_sample_num, request.batch_size
    if samples < 1:
        raise ValueError(f"n is {samples}: ask for one sample at least")
    if samples == 1 or request.bootstrap_room is None or None in request.bootstrap_room[:prompts]:
        return
    named = len(request.rid) == prompts  # by the client; else SGLang has made an id for each sample
    # SGLang repeats the whole list of prompts for each sample, and all lists with it: the first are the prompts'.
    for field in dataclasses.fields(request):
        values = getattr(request, field.name)
        if isinstance(values, list) and len(values) >= prompts and (named or field.name != "rid"):
            setattr(request, field.name, [value for value in values[:prompts] for _ in range(samples)])
    order = [sample for _ in range(prompts) for sample in range(samples)]
    request.bootstrap_room = list(map(sample_room, request.bootstrap_room, order))
    if named:
        request.rid = [f"{rid}_{sample}" for rid, sample in zip(request.rid, order, strict=True)]
    request.sampling_params = [params | {"n": 1} for params in request.sampling_params]
    request.parallel_sample_num, request.batch_size = 1, prompts * samples
