"""Rows chosen by request against first and last rows -> results/requestrows.json. `make bench-requestrows`.

SmolLM2-135M, dequantised from Q4_1, in float32 behind a bfloat16 pool, no block removed. A plan says how many rows of a
layer travel. Our rule takes the first and the last ones, SnapKV (`baselines/snapkv.py`) those that the prompt's last
queries attend to. Plans:

    one number    every layer cut to as many rows, native or in a wire dtype: the setting of SnapKV and StreamingLLM
    budget        the layers, numbers and wire dtypes of results/kv.json, which were chosen for first and last rows

SnapKV's row lists count as bytes. Judged on Brown's development split by perplexity, paired by sequence, and by
needles, whose question is at the prompt's end, where the queries that choose are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from __notes import timed_notes
from __results import HERE, commit, write
from baselines.snapkv import SnapKV

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.tasks import Setting, needle, perplexity
from pdtrim_deploy.kvchoice import Sends
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.recipe.kv import cut_to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--reductions", type=float, nargs="+", default=[4.95, 10])
    parser.add_argument("--sequences", type=int, default=32, help="judged for perplexity")
    parser.add_argument("--needles", type=int, default=3, help="at each of ten depths")
    parser.add_argument("--window", type=int, default=32, help="last queries that choose")
    options = parser.parse_args()
    note = timed_notes()
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    model, plan = load_model(checkpoint.path), PDPlan.dense(checkpoint.shape("bfloat16"))
    dense = PDOracle(model, model, plan)
    documents = registry.load("brown", Cache.default()).split("development")
    setting = Setting(load_tokenizer(checkpoint.path), dense, documents, Cache.default(), size=options.sequences)
    oracles: dict[tuple[str, str], PDOracle] = {("dense", "-"): SnapKV(dense, window=options.window)}
    for name, sends in _plans(plan, options.prompt, options.reductions).items():
        cut = dense.with_kv(sends)
        oracles[name, "first and last"] = cut
        for by in ("head", "layer"):
            oracles[name, f"SnapKV by {by}"] = SnapKV(cut, by, options.window)
            oracles[name, f"SnapKV by {by}, ends kept"] = SnapKV(cut, by, options.window, ends=True)
    texts = perplexity.prepare(setting, (options.prompt,)).measure(list(oracles.values()), note)
    hidden = needle.prepare(replace(setting, size=options.needles), options.prompt).measure(
        list(oracles.values()), note
    )
    rows = []
    for (name, rule), oracle, loss, code in zip(oracles, oracles.values(), texts, hidden, strict=True):
        size = oracle.plan.payload_bytes(options.prompt)
        size += oracle.list_bytes(options.prompt) if isinstance(oracle, SnapKV) else 0
        figures: dict[str, Any] = {"plan": name, "rule": rule, "bytes": size, "commit": commit()}
        figures |= {"reduction": plan.payload_bytes(options.prompt) / size}
        rows.append(figures | {"nll": list(loss.values["nll"]), "needle": list(code.values["exact"])})
        paired, codes = loss.against(texts[0], "nll"), code.mean("exact")
        note(f"{name}, {rule}: {figures['reduction']:.2f}x, {paired.mean:+.4f} ± {paired.stderr:.4f} nats, {codes:.0%}")
    write("requestrows", options, rows)


def _plans(dense: PDPlan, tokens: int, reductions: list[float]) -> dict[str, Sends]:
    layers, plans = len(dense.kv), dict[str, Sends]()
    for reduction in reductions:
        for dtype in ("native", "int4"):
            send = _cut(dense, tokens, reduction, dtype)
            plans[f"one number, {dtype}, {reduction:g}x"] = (send,) * layers
    known = json.loads((HERE / "results" / "kv.json").read_text())["rows"]
    for row in known:
        if row["method"] in ("ours", "ours, native wire") and row["asked"] in reductions:
            name = "budget, native" if row["method"] != "ours" else "budget"
            plans[f"{name}, {row['asked']:g}x"] = tuple(map(KVSend.model_validate, row["sends"]))
    return plans


def _cut(dense: PDPlan, tokens: int, reduction: float, dtype: str) -> KVSend:
    """The most rows at `reduction`, 4 of them first."""
    whole = dense.payload_bytes(tokens)
    for last in range(tokens - 4, 0, -1):
        send = cut_to(4, last, wire_dtype=dtype)
        if whole / dense.with_kv((send,) * len(dense.kv)).payload_bytes(tokens) >= reduction:
            return send
    raise SystemExit(f"no number of rows gives {reduction}x in {dtype}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
