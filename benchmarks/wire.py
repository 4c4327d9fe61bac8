"""What each wire dtype costs in quality, all layers full -> results/wire.json. `make bench-wire`.

SmolLM2-135M in float32 with a bfloat16 pool; continuations of Brown's development split, teacher-forced through the
PD oracle. `kl` is the mean divergence of decode's next-token distribution from that with native KV, in nats: it tells
the dtypes apart where the perplexity of this little text does not.
"""

from __future__ import annotations

import argparse
import math

import torch
from __results import write

from pdtrim_deploy.cache import Cache
from pdtrim_deploy.checkpoints import DEFAULT_SOURCE, resolve
from pdtrim_deploy.checkpoints.loading import load_model, load_tokenizer
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.wire import WIRE_DTYPES

BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    model, plan = load_model(checkpoint.path), PDPlan.dense(checkpoint.shape())
    text = registry.load("brown", Cache.default()).split("development")
    length = asked.prompt + asked.continuation
    ids = sequences(text, load_tokenizer(checkpoint.path), asked.sequences, length, asked.seed)
    native = PDOracle(model, model, plan)
    oracles = {wire: native.with_kv((KVSend(wire_dtype=wire),) * len(plan.kv)) for wire in WIRE_DTYPES}
    nll, kl = dict.fromkeys(WIRE_DTYPES, 0.0), dict.fromkeys(WIRE_DTYPES, 0.0)
    for part in ids.split(BATCH):
        prompts, continuations = part[:, : asked.prompt], part[:, asked.prompt :]
        state, reference = native.prefill(prompts), None
        first = state.logits.float().log_softmax(-1).gather(1, continuations[:, :1]).sum()
        for wire, oracle in oracles.items():
            hidden = oracle.extend(continuations[:, :-1], state.tokens, oracle.hand_over(state))
            with torch.no_grad():
                logprobs = oracle.decode.logits(hidden).float().log_softmax(-1)
            reference = logprobs if reference is None else reference
            nll[wire] -= (
                float(first + logprobs.gather(2, continuations[:, 1:, None]).sum()) / ids[:, asked.prompt :].numel()
            )
            kl[wire] += float((reference.exp() * (reference - logprobs)).sum(-1).mean()) * len(part) / len(ids)
    rows = []
    for wire, oracle in oracles.items():
        rows.append(
            {
                "wire_dtype": wire,
                "bytes": oracle.plan.payload_bytes(asked.prompt),
                "reduction": oracle.plan.reduction(asked.prompt),
                "ppl": math.exp(nll[wire]),
                "ratio": math.exp(nll[wire] - nll["native"]),
                "kl": kl[wire],
            }
        )
        print("{wire_dtype:7s} {reduction:5.2f}x  ppl {ppl:7.3f}  ratio {ratio:.4f}  KL {kl:.6f}".format(**rows[-1]))
    write("wire", asked, rows)


if __name__ == "__main__":
    main()
