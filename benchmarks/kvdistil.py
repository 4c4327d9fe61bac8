"""Prefill blocks that run for K and V alone, trained, and a quantised wire behind them -> results/kvdistil.json.

`make bench-kvdistil`. SmolLM2-135M, dequantised from Q4_1, in float32. A run builds one prefill, as a recipe would: the
blocks whose absence alone costs least run for their K and V alone, least squares fits these and the layers around the
gaps, then prefill is trained by what decode predicts behind its KV; and one plan for each of `--kv`. Each pair, and the
dense prefill behind the same plans, is judged through both stages, on texts of four corpora. Nothing was fitted or
trained on Austen's novels, nor on the judged splits of the others. Losses are written down as they come
(out/bench-kvdistil): a run that is stopped goes on where it was. The file keeps rows of other commits that were judged
on as many texts and tokens; the table pairs each with the dense row of its commit. Settings are chosen with
`--split development`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from typing import Any

from __built import built
from __notes import Note, timed_notes
from __results import HERE, commit, committed, write
from __savings import bfloat16_reduction

from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import windows
from pdtrim_deploy.evaluation.perplexity import BATCH
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.pd_run import sequence_nll
from pdtrim_deploy.recipe import Recipe

PLACE, UNITS = HERE.parent / "out" / "bench-kvdistil", HERE.parent / "recipes" / "units"
CORPORA = ("brown", "austen", "code", "agents")
TEXTS = {"brown": "brown", "mixed": "mixed-agents"}
"""What is trained on, and its file in recipes/units/calibration."""
KV: dict[str, dict[str, Any]] = {
    "native": {"method": "none"},
    "int4": {"method": "none", "wire_dtype": "int4"},
    "k4v3": {"method": "none", "wire_dtype": "k4v3"},
    "int3": {"method": "none", "wire_dtype": "int3"},
    # of a float32 pool: 4.95x of a bfloat16 one
    "budget 4.95x": {"method": "budget", "reduction": 9.9, "recall": 0.25, "sequences": 24, "prompt_tokens": 448},
}
SPLITS = ("development", "final")
_SETTINGS = ("blocks", "text", "steps", "learning_rate", "sweep", "sequences", "fit_sequences", "length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--text", choices=TEXTS, default="mixed", help="that is fitted and trained on")
    parser.add_argument("--steps", type=int, default=128, help="of training; 0: least squares alone")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--sweep", type=float, nargs="+", default=[1.0, 3.0], help="factors of the rate, tried first")
    parser.add_argument("--sequences", type=int, default=320, help="trained on and held out")
    parser.add_argument("--length", type=int, default=256, help="of each, tokens; half of them are its prompt")
    parser.add_argument("--fit-sequences", type=int, default=32, help="the first of them: least squares fits on these")
    parser.add_argument("--kv", nargs="+", choices=KV, default=["k4v3"], help="beside native")
    parser.add_argument("--split", choices=SPLITS, default="final")
    parser.add_argument("--development", type=int, default=12, help="texts judged of each corpus")
    parser.add_argument("--final", type=int, default=40, help="the same")
    parser.add_argument("--prompt", type=int, default=448, help="tokens of prompt")
    parser.add_argument("--continuation", type=int, default=128, help="tokens judged behind it")
    options = parser.parse_args()
    options.kv = [*dict.fromkeys(("native", *options.kv))]  # what the table compares with
    note = timed_notes()
    about = {name: getattr(options, name) for name in (*SPLITS, "prompt", "continuation")}
    log = RowLog(PLACE / "rows.jsonl", about | {"commit": commit()})
    trained = {name: getattr(options, name) for name in _SETTINGS}
    for setting in ({"blocks": 0}, trained):
        missing = [
            (corpus, kv)
            for corpus in CORPORA
            for kv in options.kv
            if not log.find(setting=setting, split=options.split, corpus=corpus, kv=kv)
            and (setting["blocks"] or "budget" not in kv)  # of another prefill it would be another plan
        ]
        if missing:
            bench = _Bench(setting, sorted({kv for _, kv in missing}, key=[*KV].index), note)
            for corpus in dict.fromkeys(corpus for corpus, _ in missing):
                plans = [kv for of_corpus, kv in missing if of_corpus == corpus]
                log.append(*bench.rows(corpus, options.split, plans, about))
            bench.forget()
    options.__dict__.update(dict.fromkeys((*_SETTINGS, "kv", "split")))
    older = committed(HERE / "results" / "kvdistil.json", options, about)
    write("kvdistil", options, [*(row for row in older if row not in log.rows), *log.rows])


class _Bench:
    """One prefill, behind which plans differ by their KV alone."""

    def __init__(self, setting: dict[str, Any], plans: Sequence[str], note: Note) -> None:
        self._setting, self._note, self._cache, self._commit = setting, note, Cache.default(), commit()
        name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
        self._folder, self._oracles = PLACE / f"bundle-{name}", dict[str, PDOracle]()
        for kv in plans:
            bundle = built(self._recipe(KV[kv]), self._folder)
            if not self._oracles:
                first = oracle_of(bundle, note, None)
                self._tokenizer = load_tokenizer(bundle.prefill_dir)
            offsets = KeyOffsets.read(bundle.prefill_dir, bundle.plan)
            self._oracles[kv] = PDOracle(first.prefill_model, first.decode_model, bundle.plan, offsets)
        report = self._folder / "reports" / "healing.json"
        self._healing = json.loads(report.read_text()) if setting["blocks"] else {}

    def _recipe(self, kv: dict[str, Any]) -> Recipe:
        setting = self._setting
        text = TEXTS[setting.get("text", "mixed")]
        units = [str(UNITS / "model" / "smollm2.yaml"), str(UNITS / "calibration" / f"{text}.yaml")]
        content: dict[str, Any] = {"include": units, "name": "kvdistil", "kv": kv}
        if setting["blocks"]:
            steps = {"prefill_steps": setting["steps"], **{name: setting[name] for name in ("learning_rate", "sweep")}}
            content["healing"] = {"compensation": "least-squares", "kv_only_blocks": setting["blocks"]}
            content["healing"] |= steps if setting["steps"] else {}
            content["healing"] |= {name: setting[name] for name in ("sequences", "fit_sequences", "length")}
        PLACE.mkdir(parents=True, exist_ok=True)
        (PLACE / "recipe.yaml").write_text(json.dumps(content))
        return Recipe.load(PLACE / "recipe.yaml")

    def rows(self, corpus: str, split: Any, plans: Sequence[str], about: dict[str, int]) -> list[dict[str, Any]]:
        """The loss of each text behind each plan, nats a token, and how the weights came to be."""
        documents = registry.load(corpus, self._cache, self._note).split(split)
        prompt, length = about["prompt"], about["prompt"] + about["continuation"]
        texts = windows(documents, self._tokenizer, about[split], length, 0)
        losses: dict[str, list[float]] = {kv: [] for kv in plans}
        for part in texts.ids.split(BATCH):
            state = self._oracles[plans[0]].prefill(part[:, :prompt])
            for kv in plans:
                scored = sequence_nll(self._oracles[kv].score(state, part[:, prompt:]))
                losses[kv] += [round(nll, 6) for nll in scored.tolist()]
        self._note(f"{self._setting['blocks']} blocks, judged on {corpus}: {', '.join(plans)}")
        origin = {"which": self._healing.get("kv_only_blocks", []), "healing": self._healing.get("healing", {})}
        return [
            {"setting": self._setting, "kv": kv, "split": split, "corpus": corpus, "nll": losses[kv]}
            | {"documents": list(texts.documents)}
            | {"saved": bfloat16_reduction(self._oracles[kv].plan, prompt), "commit": self._commit, **origin}
            for kv in plans
        ]

    def forget(self) -> None:
        """Remove the bundle; what was trained stays in the cache."""
        shutil.rmtree(self._folder)


if __name__ == "__main__":
    main()
