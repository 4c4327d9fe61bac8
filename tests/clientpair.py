"""A tiny served pair of a sparse plan, its oracle, and requests of clients."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from unlikestages import SPARSE, unlike_plan, write_stages

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, KVSend

TOLERANCE = 1e-3  # nats, float32
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ClientPair:
    """`url` is the router's."""

    url: str
    oracle: PDOracle
    tokenizer: Any

    def post(self, path, body):
        """One request; a pair that hangs raises httpx.TimeoutException."""
        return httpx.post(f"{self.url}/{path}", json=body, timeout=TIMEOUT_S, trust_env=False)

    def streamed(self, path, body):
        """The joined deltas, and the last reason to finish."""
        text, reason, done = "", None, False
        url, streaming = f"{self.url}/{path}", body | {"stream": True}
        with httpx.stream("POST", url, json=streaming, timeout=TIMEOUT_S, trust_env=False) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                        reason = choice["finish_reason"] or reason
        assert done
        return text, reason

    def off(self, prompt, scored):
        """Distance of served (logprob, token) pairs from the oracle's, or from its likeliest tokens, in nats."""
        values, tokens = (torch.tensor(part) for part in zip(*((pair[0], pair[1]) for pair in scored), strict=True))
        ids, ranked = self.oracle.top_logprobs(torch.tensor(prompt), tokens, self.oracle.decode_model.config.vocab_size)
        right = ranked[ids == tokens[:, None]]
        return max((values - right).abs().max().item(), (ranked[:, 0] - right).max().item())


def client_stages(model, folder, cache):
    """Prefill without block 3, decode without 1 and 3, one full layer; returns the plan."""
    checkpoint = open_checkpoint(model, cache)
    plan = unlike_plan(checkpoint, (KVSend(), *[SPARSE] * 3))
    write_stages(checkpoint, folder, plan)
    return plan


def client_oracle(folder, plan):
    """The oracle of `client_stages`."""
    return PDOracle(*(load_model(folder / stage, "float32") for stage in STAGES), plan)


def exactly(text):
    """Sampling parameters that make any model answer with `text`, by guided decoding."""
    return {"regex": re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", text)}
