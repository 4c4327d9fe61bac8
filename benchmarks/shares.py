"""Fixed rows against a share of the prompt at equal bytes -> results/shares.json. `make bench-shares`.

SmolLM2-135M, dequantised from Q4_1, in float32 behind a bfloat16 pool, no block removed. Three plans cut the same
layers in the same wire dtypes, those of the budget plan of results/kv.json, which was chosen at 512 prompt tokens:

    chosen at 512    that plan: as many rows of a layer whatever the prompt
    fixed            the same with all numbers of rows times one factor, so that one request of each length together
                     takes as many bytes as under `share`, or a little fewer
    share            the same rows at 512 tokens, as shares of the prompt

Judged on Brown's development split: each sequence's mean loss after each length, so that differences are paired. Each
sequence is written down when it is judged, and the benchmark goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.kvchoice import Sends
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.kv import SHARE_UNIT
from pdtrim_deploy.recipe.kv import cut_to

CHOSEN_AT = 512
LEAST = 4  # a share's least number of rows is this part of its rows at 512 tokens: at prompts of 128 it begins
DRAWN = 24  # sequences, of which the first `--sequences` are judged
PLACE = HERE.parent / "out" / "bench-shares"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="prompt tokens")
    parser.add_argument("--reduction", type=float, default=8.0, help="of the plan in results/kv.json")
    parser.add_argument("--sequences", type=int, default=12, choices=range(2, DRAWN + 1), metavar="N", help="judged")
    parser.add_argument("--continuation", type=int, default=65, help="tokens of each, after its prompt")
    options = parser.parse_args()
    started, cpu = time.monotonic(), time.process_time()
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    model, plan = load_model(checkpoint.path), PDPlan.dense(checkpoint.shape("bfloat16"))
    oracle = PDOracle(model, model, plan)
    plans = _plans(plan, options.reduction, options.lengths)
    about = [{name: [send.model_dump() for send in sends] for name, sends in plans.items()}, options.continuation]
    log = RowLog(PLACE / "values.jsonl", about)
    documents = registry.load("brown", Cache.default()).split("development")
    texts = {
        tokens: sequences(documents, load_tokenizer(checkpoint.path), DRAWN, tokens + options.continuation, 0)
        for tokens in options.lengths
    }
    loss: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in options.lengths}
    for at in range(options.sequences):
        for tokens, ids in texts.items():
            row, name = ids[at : at + 1], f"sequence {at} at {tokens}"
            loss[tokens].append(log.value(name, lambda row=row, tokens=tokens: _judged(oracle, plans, row, tokens)))
            print(f"{time.monotonic() - started:6.0f} s, {time.process_time() - cpu:6.0f} s of CPU: {name}", flush=True)
    rows = []
    for tokens in options.lengths:
        for name, sends in plans.items():
            cut = plan.with_kv(sends)
            figures = {"plan": name, "prompt_tokens": tokens, "bytes": cut.payload_bytes(tokens)}
            figures |= {"reduction": cut.reduction(tokens), "commit": commit()}
            rows.append(figures | {"loss": [values[name] for values in loss[tokens]]})
    write("shares", options, rows)


def _judged(oracle: PDOracle, plans: dict[str, Sends], row: Tensor, tokens: int) -> dict[str, float]:
    """Mean loss in nats a token by plan; the first token, which prefill gives, does not count."""
    state, loss = oracle.prefill(row[:, :tokens]), {}
    for name, sends in plans.items():
        scores = oracle.with_kv(sends).score(state, row[:, tokens:])[0, 1:]
        loss[name] = round(-float(scores.double().mean()), 6)
    return loss


def _plans(dense: PDPlan, reduction: float, lengths: Sequence[int]) -> dict[str, Sends]:
    known = json.loads((HERE / "results" / "kv.json").read_text())["rows"]
    row: dict[str, Any] = next(row for row in known if (row["method"], row["asked"]) == ("ours", reduction))
    chosen = tuple(map(KVSend.model_validate, row["sends"]))
    share = tuple(_share(send) if send.mode == "sparse" else send for send in chosen)

    def size(sends: Sends) -> int:
        return sum(dense.with_kv(sends).payload_bytes(tokens) for tokens in lengths)

    def times(factor: int) -> Sends:
        return tuple(
            send.model_copy(update={"n_last": -(-(send.n_first + send.n_last) * factor // 1000) - send.n_first})
            if send.mode == "sparse"
            else send
            for send in chosen
        )

    factor = 1000  # thousandths
    while size(times(factor + 1)) <= size(share):
        factor += 1
    return {"dense": (KVSend(),) * len(chosen), "chosen at 512": chosen, "fixed": times(factor), "share": share}


def _share(send: KVSend) -> KVSend:
    """As many rows at 512 tokens, as a share; in 1024ths that is exact."""
    rows = send.n_first + send.n_last
    least = max(send.n_first + 1, rows // LEAST)
    return cut_to(send.n_first, least - send.n_first, rows * SHARE_UNIT // CHOSEN_AT, wire_dtype=send.wire_dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
