"""KV-only prefill whose prompts' last tokens run the unchanged model, by the length of this tail -> results/tail.json.

`make bench-tail`. In float32, decode as it was, KV native. One prefill a model: SmolLM2-135M with 12 of 30 blocks that
make K and V alone, trained as in bench-kvdistil, or Qwen2.5-Coder-0.5B with 6 of 24, by least squares, as in
bench-generated. No weight depends on the tail, which runs the model's own. Each is judged through both stages with
every tail, on final texts of four corpora after prompts of several lengths, and by facts inside a prompt that are asked
for at its end. Losses are written down as they come (out/bench-tail), and the benchmark goes on from there: `--models`,
`--prompts`, `--tails` choose what a run does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from __built import built
from __notes import timed_notes
from __results import HERE, commit, committed, write

from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
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
TRAINED = {"prefill_steps": 128, "learning_rate": 3e-4, "sweep": [1.0, 3.0], "sequences": 320, "fit_sequences": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SmolLM2-135M": ("smollm2", "mixed-agents", {"kv_only_blocks": 12} | TRAINED),
    "Qwen2.5-Coder-0.5B": ("qwen2.5-coder-0.5b", "mixed", {"kv_only_blocks": 6, "sequences": 64}),
}
"""By model: its file in recipes/units/model, the calibration text, and the healing section beside least squares."""
NEEDLE = "needle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL")
    tails = "tokens that run the unchanged model"
    parser.add_argument("--tails", type=int, nargs="+", default=[0, 64, 128, 256], help=tails)
    parser.add_argument("--prompts", type=int, nargs="+", default=[448, 1920], help="tokens")
    parser.add_argument("--texts", type=int, default=40, help="of each corpus, after prompts of up to 512 tokens")
    parser.add_argument("--long", type=int, default=12, help="the same, after longer prompts")
    parser.add_argument("--continuation", type=int, default=128, help="tokens judged after the prompt")
    parser.add_argument("--needles", type=int, default=3, help="at each of ten depths")
    options = parser.parse_args()
    note, about = timed_notes(), {name: getattr(options, name) for name in ("texts", "long", "continuation", "needles")}
    log = RowLog(PLACE / "rows.jsonl", about)
    for model in options.models:
        parts = [(prompt, corpus) for prompt in options.prompts for corpus in (*CORPORA, NEEDLE)]
        tails = [None, *options.tails]  # None: dense
        missing = [
            (prompt, corpus, tail)
            for prompt, corpus in parts
            for tail in tails
            if not log.find(model=model, prompt=prompt, corpus=corpus, tail=tail)
        ]
        if missing:
            bench = _Bench(model, about)
            for prompt, corpus, tail in missing:
                log.append(bench.row(prompt, corpus, tail))
                note(f"{model}: {corpus} after {prompt} tokens, tail {tail}")
            bench.forget()
    kept = [row for row in committed(HERE / "results" / "tail.json", options, about) if row not in log.rows]
    known = {(row["model"], row["prompt"], row["corpus"], row["tail"]) for row in log.rows}
    kept = [row for row in kept if (row["model"], row["prompt"], row["corpus"], row["tail"]) not in known]
    options.__dict__.update(dict.fromkeys(("models", "tails", "prompts")))
    print(write("tail", options, [*kept, *log.rows]))


class _Bench:
    """One pair, whose prefill runs tails of any length."""

    def __init__(self, model: str, about: dict[str, int]) -> None:
        unit, text, section = MODELS[model]
        units = [str(UNITS / "model" / f"{unit}.yaml"), str(UNITS / "calibration" / f"{text}.yaml")]
        healing = {"compensation": "least-squares", "kv_only_tail": 1} | section
        PLACE.mkdir(parents=True, exist_ok=True)
        file = PLACE / "recipe.yaml"
        file.write_text(json.dumps({"include": units, "name": "tail", "kv": {"method": "none"}, "healing": healing}))
        self._model, self._about, self._cache, self._folder = model, about, Cache.default(), PLACE / f"bundle-{unit}"
        bundle = built(Recipe.load(file), self._folder)
        self._oracle = oracle_of(bundle, lambda _: None, None)
        self._tokenizer = load_tokenizer(bundle.prefill_dir)
        self._which = [bundle.plan.prefill_layers[layer] for layer in bundle.plan.kv_only_layers]

    def row(self, prompt: int, corpus: str, tail: int | None) -> dict[str, Any]:
        """Losses of each text, nats a token, or which needles are right."""
        oracle, share = self._with(tail), 1.0 if tail is None else self._with(tail).plan.prefill_share(prompt)
        row = {"model": self._model, "prompt": prompt, "corpus": corpus, "tail": tail, "which": self._which}
        row |= {"share": share, "commit": commit(), "machine": machine()["cpu"]}
        return row | (self._needles(oracle, prompt) if corpus == NEEDLE else self._losses(oracle, prompt, corpus))

    def _with(self, tail: int | None) -> PDOracle:
        oracle = self._oracle
        if tail is None:
            return PDOracle(oracle.decode_model, oracle.decode_model, PDPlan.dense(oracle.plan.model))
        plan = oracle.plan.with_parts(kv_only_tail=tail)
        return PDOracle(oracle.prefill_model, oracle.decode_model, plan)

    def _losses(self, oracle: PDOracle, prompt: int, corpus: str) -> dict[str, Any]:
        documents = registry.load(corpus, self._cache).split("final")
        count = self._about["texts" if prompt <= 512 else "long"]
        ids = sequences(documents, self._tokenizer, count, prompt + self._about["continuation"], 0)
        losses: list[float] = []
        for part in ids.split(BATCH):
            scored = sequence_nll(oracle.score(oracle.prefill(part[:, :prompt]), part[:, prompt:]))
            losses += [round(nll, 6) for nll in scored.tolist()]
        return {"nll": losses}

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
