"""The subset rule relaxed: blocks that decode keeps and prefill runs for K and V alone -> results/kvonly.json.

`make bench-kvonly`. SmolLM2-135M, dequantised from Q4_1, in float32, decode whole, KV whole. Of n blocks prefill
computes K and V only, from the hidden state in front of the gap: with the block's own projections, with projections
refitted by least squares, and with the layers around the gaps refitted too. Beside them the same number of blocks
dropped in both stages, which is what the subset rule would ask for. Chosen and fitted on Brown's calibration split,
judged through the PD oracle on Brown's final split and on Jane Austen.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from __notes import timed_notes
from __results import write

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.perplexity import pd_perplexity
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.kv_only import fit, fit_kv_only, rank
from pdtrim_deploy.pruning.pair import StagePair

CORPORA = ("brown", "austen")
PROJECTIONS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--calibration", type=int, default=16, help="sequences that choose and fit")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--sequences", type=int, default=24, help="judged, of each corpus")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    note = timed_notes()
    checkpoint, cache = resolve(DEFAULT_SOURCE, Cache.default()), Cache.default()
    tokenizer, model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)
    corpora = {name: registry.load(name, cache) for name in CORPORA}
    ids = sequences(corpora["brown"].split("calibration"), tokenizer, options.calibration, options.length, options.seed)
    count, tokens = options.sequences, options.prompt + options.continuation
    text = {n: sequences(c.split("final"), tokenizer, count, tokens, options.seed) for n, c in corpora.items()}
    dense = StagePair(model, PDPlan.dense(checkpoint.shape("float32")))
    rows: list[dict[str, Any]] = []

    def judge(blocks: int, what: str, pair: StagePair) -> None:
        oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
        judged = {name: pd_perplexity(oracle, text[name], options.prompt) for name in CORPORA}
        ppls: dict[str, Any] = {f"{name}_ppl": result.ppl for name, result in judged.items()}
        ppls |= {f"{name}_nll": [round(nll, 6) for nll in result.per_sequence] for name, result in judged.items()}
        alone = [b for b, action in enumerate(pair.plan.prefill) if action.kind != "keep"]
        rows.append({"blocks": blocks, "what": what, "which": alone, "decode": len(pair.plan.decode_layers)} | ppls)
        note(f"{blocks}, {what}")

    judge(0, "dense", dense)
    order = rank(dense, ids, print)
    for blocks in options.blocks:
        fitted = fit_kv_only(dense, order[:blocks], ids)
        judge(blocks, "K and V alone, own projections", unfitted(fitted))
        judge(blocks, "K and V alone, refitted", fitted)
        mended = get_compensation("least-squares").compensate(fitted, "prefill", ids, lambda _: None)
        judge(blocks, "K and V alone, refitted, gaps too", fit(mended, ids))
        gone = {b for b, action in enumerate(fitted.plan.prefill) if action.kind != "keep"}
        actions = tuple(Drop() if b in gone else Keep() for b in range(len(model.model.layers)))
        kv = (KVSend(),) * (len(actions) - blocks)
        dropped = replace(dense, plan=PDPlan(model=dense.plan.model, prefill=actions, decode=actions, kv=kv))
        judge(blocks, "dropped in both stages", dropped)
        for stage in ("prefill", "decode"):
            dropped = get_compensation("least-squares").compensate(dropped, stage, ids, lambda _: None)
        judge(blocks, "dropped in both stages, gaps refitted", dropped)
    write("kvonly", options, rows)


def unfitted(pair: StagePair) -> StagePair:
    """The same blocks with the model's own K and V projections."""
    changed = {
        block: {name: tensor for name, tensor in tensors.items() if name not in PROJECTIONS}
        for block, tensors in pair.changed["prefill"].items()
    }
    return replace(pair, changed={**pair.changed, "prefill": changed})


if __name__ == "__main__":
    main()
