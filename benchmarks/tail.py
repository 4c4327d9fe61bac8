"""KV-only prefill whose prompts' last tokens run the unchanged model, by the length of this tail -> results/tail.json.

`make bench-tail`. In float32, decode as it was, KV native. In each prefill (`PREFILLS`) the last blocks make K and V
alone, fitted by least squares, or trained too, as a recipe with a tail of 128 tokens has them. Each is judged through
both stages with every tail, on final texts of four corpora after prompts of several lengths, and by facts inside a
prompt that are asked for at its end. Losses are written down as they come (out/bench-tail), and the benchmark goes on
from there: `--prefills`, `--prompts`, `--tails` choose what a run does. Dense rows of the committed file are not judged
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from __built import built
from __former_units import TRAINED_10, TRAINED_12
from __notes import timed_notes
from __results import HERE, commit, committed, write

from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import windows
from pdtrim_deploy.evaluation.perplexity import BATCH
from pdtrim_deploy.evaluation.tasks import Setting, needle
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.pd_run import sequence_nll
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import Recipe

PLACE, UNITS = HERE.parent / "out" / "bench-tail", HERE.parent / "recipes" / "units"
CORPORA = ("brown", "austen", "code", "agents")
SMOLLM2, CODER = "SmolLM2-135M", "Qwen2.5-Coder-0.5B"
_MIXED = ("model/smollm2", "calibration/mixed-agents")
_TRAINED = ("model/smollm2", "calibration/mixed-code-agents")
_CODER = ("model/qwen2.5-coder-0.5b", "calibration/mixed")
_FITTED = {"kv_only_tail": 128, "sequences": 64}
PREFILLS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "the last 8, fitted": (SMOLLM2, _MIXED, _FITTED | {"kv_only_blocks": 8}),
    "the last 10, fitted": (SMOLLM2, _MIXED, _FITTED | {"kv_only_blocks": 10}),
    "the last 10, trained": (SMOLLM2, _TRAINED, TRAINED_10),
    "the last 10, trained longer": (SMOLLM2, (*_TRAINED, "healing/kv-only-10-tail"), {}),
    "the last 12, fitted": (SMOLLM2, _MIXED, _FITTED | {"kv_only_blocks": 12}),
    "the last 12, trained": (SMOLLM2, _TRAINED, TRAINED_12),
    "the last 6, fitted": (CODER, _CODER, _FITTED | {"kv_only_blocks": 6}),
    "the last 8 of 24, fitted": (CODER, _CODER, _FITTED | {"kv_only_blocks": 8}),
}
"""By its KV-only blocks: a model, the units of its recipe, and what its healing section has beside them."""
NEEDLE, DENSE = "needle", "dense"
KEY = ("model", "prompt", "corpus", "prefill", "tail")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefills", nargs="+", default=[*PREFILLS], choices=PREFILLS, metavar="PREFILL")
    tails = "tokens that run the unchanged model"
    parser.add_argument("--tails", type=int, nargs="+", default=[64, 128, 256], help=tails)
    parser.add_argument("--prompts", type=int, nargs="+", default=[448, 1920], help="tokens")
    parser.add_argument("--texts", type=int, default=40, help="of each corpus, after prompts of up to 512 tokens")
    parser.add_argument("--long", type=int, default=12, help="the same, after longer prompts")
    parser.add_argument("--continuation", type=int, default=128, help="tokens judged after the prompt")
    parser.add_argument("--needles", type=int, default=3, help="at each of ten depths")
    options = parser.parse_args()
    if min(options.tails) < 1:
        parser.error("--tails: at least 1; without a tail prefill's last blocks make its first token")
    note, about = timed_notes(), {name: getattr(options, name) for name in ("texts", "long", "continuation", "needles")}
    log = RowLog(PLACE / "rows.jsonl", about)
    kept = committed(HERE / "results" / "tail.json", options, about)
    dense = {(row["model"], row["prompt"], row["corpus"]) for row in kept if row["prefill"] == DENSE}
    for prefill in options.prefills:
        parts = [(prompt, corpus) for prompt in options.prompts for corpus in (*CORPORA, NEEDLE)]
        model = PREFILLS[prefill][0]
        plans = [(DENSE, 0), *((prefill, tail) for tail in options.tails)]
        missing = [
            (prompt, corpus, plan, tail)
            for prompt, corpus in parts
            for plan, tail in plans
            if not log.find(model=model, prompt=prompt, corpus=corpus, prefill=plan, tail=tail)
            and (plan != DENSE or (model, prompt, corpus) not in dense)
        ]
        if missing:
            bench = _Bench(prefill, about)
            for prompt, corpus, plan, tail in missing:
                log.append(bench.row(prompt, corpus, plan, tail))
                note(f"{model}: {corpus} after {prompt} tokens, {plan}, tail {tail}")
            bench.forget()
    known = {tuple(row[name] for name in KEY) for row in log.rows}
    kept = [row for row in kept if tuple(row[name] for name in KEY) not in known]
    options.__dict__.update(dict.fromkeys(("prefills", "tails", "prompts")))
    print(write("tail", options, [*kept, *log.rows]))


class _Bench:
    """One pair, whose prefill runs tails of any length."""

    def __init__(self, prefill: str, about: dict[str, int]) -> None:
        self._model, names, healing = PREFILLS[prefill]
        self._about, self._cache = about, Cache.default()
        self._folder = PLACE / f"bundle-{[*PREFILLS].index(prefill)}"
        PLACE.mkdir(parents=True, exist_ok=True)
        file, units = PLACE / "recipe.yaml", [str(UNITS / f"{name}.yaml") for name in names]
        file.write_text(json.dumps({"include": units, "name": "tail", "kv": {"method": "none"}, "healing": healing}))
        bundle = built(Recipe.load(file), self._folder)
        self._oracle = oracle_of(bundle, lambda _: None, None)
        self._tokenizer = load_tokenizer(bundle.prefill_dir)
        self._which = [*bundle.plan.kv_only_blocks]

    def row(self, prompt: int, corpus: str, plan: str, tail: int) -> dict[str, Any]:
        """Losses of each text, nats a token, or which needles are right."""
        oracle = self._oracle if plan != DENSE else self._dense()
        if plan != DENSE:
            oracle = PDOracle(oracle.prefill_model, oracle.decode_model, oracle.plan.with_parts(kv_only_tail=tail))
        row = {"model": self._model, "prompt": prompt, "corpus": corpus, "prefill": plan, "tail": tail}
        row |= {"which": [] if plan == DENSE else self._which, "share": oracle.plan.prefill_share(prompt)}
        row |= {"commit": commit(), "machine": machine()["cpu"]}
        return row | (self._needles(oracle, prompt) if corpus == NEEDLE else self._losses(oracle, prompt, corpus))

    def _dense(self) -> PDOracle:
        decode = self._oracle.decode_model
        return PDOracle(decode, decode, PDPlan.dense(self._oracle.plan.model))

    def _losses(self, oracle: PDOracle, prompt: int, corpus: str) -> dict[str, Any]:
        documents = registry.load(corpus, self._cache).split("final")
        count = self._about["texts" if prompt <= 512 else "long"]
        texts = windows(documents, self._tokenizer, count, prompt + self._about["continuation"], 0)
        losses: list[float] = []
        for part in texts.ids.split(BATCH):
            scored = sequence_nll(oracle.score(oracle.prefill(part[:, :prompt]), part[:, prompt:]))
            losses += [round(nll, 6) for nll in scored.tolist()]
        return {"nll": losses, "documents": list(texts.documents)}

    def _needles(self, oracle: PDOracle, prompt: int) -> dict[str, Any]:
        documents = registry.load("brown", self._cache).split("final")
        setting = Setting(self._tokenizer, oracle, documents, self._cache, size=self._about["needles"])
        (result,) = needle.prepare(setting, prompt).measure([oracle], lambda _: None)
        return {"right": [int(right) for right in result.values["exact"]]}

    def forget(self) -> None:
        """Remove the bundle; what was trained stays in the cache."""
        shutil.rmtree(self._folder)


if __name__ == "__main__":
    main()
