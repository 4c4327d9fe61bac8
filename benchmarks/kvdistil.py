"""Prefill blocks run for K and V alone: least squares, and training through decode behind it -> results/kvdistil.json.

`make bench-kvdistil`. SmolLM2-135M, dequantised from Q4_1, in float32; decode whole, KV whole. The blocks whose
absence alone costs least run for their K and V alone: those of results/kvonly.json, which are chosen in the same way,
where it has as many. Least squares fits these and the layers around the gaps. Then prefill is trained by what decode
predicts behind its KV, as `healing.prefill_steps` does, from the same weights. All of it on calibration text of
Brown. Each pair is judged through both stages, sequence by sequence, on final text of Brown and of Jane Austen, or
with `--split development` on development text. What is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from typing import Any

import torch
from __results import HERE, commit, write

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.pd_run import sequence_nll
from pdtrim_deploy.plan import Keep, KVOnly, PDPlan
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.healing import StateFile, heal
from pdtrim_deploy.pruning.kv_only import fit, fit_kv_only, rank
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_run
from pdtrim_deploy.recipe.healing import HealingSection

PLACE = HERE.parent / "out" / "bench-kvdistil"
CORPORA = ("brown", "austen")
_ABOUT = ("ranked", "refitted", "fitted", "length", "judged", "split", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=48, help="of training; 0: least squares alone")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--ranked", type=int, default=16, help="sequences that blocks are chosen on")
    parser.add_argument("--refitted", type=int, default=16, help="sequences that least squares fits on")
    parser.add_argument("--fitted", type=int, default=128, help="sequences that are trained on and held out")
    parser.add_argument("--length", type=int, default=256, help="tokens of each; half is prompt")
    parser.add_argument("--judged", type=int, default=24, help="sequences of each corpus")
    parser.add_argument("--split", choices=("development", "final"), default="final")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()

    def note(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    log = RowLog(PLACE / f"rows-{options.split}.jsonl", [[name, getattr(options, name)] for name in _ABOUT])
    training = {"steps": options.steps, "learning_rate": options.learning_rate, "batch": options.batch}
    keys: list[dict[str, Any]] = [{"what": "dense"}]
    for blocks in options.blocks:
        keys.append({"what": "least squares", "blocks": blocks})
        keys += [{"what": "trained", "blocks": blocks, "training": training}] if options.steps else []
    bench = None
    for key in keys:
        if log.find(**key) is None:
            bench = bench or _Bench(options, note)
            log.append(key | bench.row(key))
    write("kvdistil", options, [row for key in keys if (row := log.find(**key))])


class _Bench:
    """The model, the text that chooses, fits and trains, and the text that judges."""

    def __init__(self, options: argparse.Namespace, note: Any) -> None:
        cache = Cache.default()
        checkpoint = resolve(DEFAULT_SOURCE, cache, note)
        tokenizer, model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)
        corpora = {name: registry.load(name, cache, note) for name in CORPORA}

        def text(corpus: str, split: Any, count: int) -> torch.Tensor:
            return sequences(corpora[corpus].split(split), tokenizer, count, options.length, options.seed)

        self._options, self._note = options, note
        self._ids = text("brown", "calibration", options.fitted)
        self._judged = {name: text(name, options.split, options.judged) for name in CORPORA}
        self._dense = StagePair(model, PDPlan.dense(checkpoint.shape("float32")))

    def _which(self, blocks: int) -> list[int]:
        options = self._options
        known = json.loads((HERE / "results" / "kvonly.json").read_text())
        same = [known["options"][name] for name in ("calibration", "length", "seed")]
        if same == [options.ranked, options.length, options.seed]:
            rows = [row for row in known["rows"] if row["blocks"] == blocks and row["what"].startswith("K and V")]
            if rows:
                return rows[0]["which"]
        order = RowLog(PLACE / "order.jsonl", [options.ranked, options.fitted, options.length, options.seed])
        ids = self._ids[: options.ranked]
        return sorted(order.value("order", lambda: rank(self._dense, ids, self._note))[:blocks])

    def _about(self, blocks: int) -> str:
        """All that fitted and trained weights depend on, but how they are trained."""
        fits = {name: getattr(self._options, name) for name in _ABOUT if name not in ("judged", "split")}
        return json.dumps({"commit": commit(), "which": self._which(blocks)} | fits)

    def row(self, key: dict[str, Any]) -> dict[str, Any]:
        """What training did, and the loss of each judged sequence, nats a token."""
        if key["what"] == "dense":
            return {"commit": commit()} | self._losses(self._dense)
        options, blocks = self._options, key["blocks"]
        pair, row = self._refitted(blocks), {"which": self._which(blocks), "commit": commit()}
        if key["what"] == "trained":
            section = HealingSection(
                prefill_steps=options.steps, learning_rate=options.learning_rate, batch=options.batch,
                sequences=options.fitted, length=options.length, seed=options.seed,
            )  # fmt: skip
            about = self._about(blocks)
            training = f"{options.steps}-{options.learning_rate:g}-{options.batch}"
            place = PLACE / f"trained-{blocks}-{training}-{_digest(about)}.safetensors"
            done = place.with_suffix(".blocks")
            reports = RowLog(place.with_suffix(".jsonl"), about)
            if not (done.exists() and reports.rows):
                file = StateFile(place, about)
                healed = heal(pair, "prefill", self._ids, section, self._note, file=file, clock=time.process_time)
                save_blocks(healed.pair.changed["prefill"], done.with_suffix(".part"))
                done.with_suffix(".part").rename(done)
                reports.append(healed.report)
                place.unlink(missing_ok=True)
            row["report"] = reports.rows[-1]
            pair = pair.with_changes("prefill", read_blocks(done))
        return row | self._losses(pair)

    def _refitted(self, blocks: int) -> StagePair:
        options, which, dense = self._options, self._which(blocks), self._dense
        ids = self._ids[: options.refitted]
        file = PLACE / f"refitted-{blocks}-{_digest(self._about(blocks))}.safetensors"
        if not file.exists():
            pair = fit_kv_only(dense, which, ids, self._note)
            pair = fit(get_compensation("least-squares").compensate(pair, "prefill", ids, self._note), ids, self._note)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_blocks(pair.changed["prefill"], file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        actions = tuple(KVOnly() if block in which else Keep() for block in range(len(dense.plan.prefill)))
        return StagePair(dense.model, dense.plan.with_parts(prefill=actions), {"prefill": read_blocks(file)})

    @torch.no_grad()
    def _losses(self, pair: StagePair) -> dict[str, list[float]]:
        losses = {}
        for name, ids in self._judged.items():
            parts = [sequence_nll(part) for part in pd_run(pair, ids).logprobs()]
            losses[f"{name}_nll"] = [round(nll, 6) for nll in torch.cat(parts).tolist()]
            self._note(f"judged on {name}")
        return losses


def _digest(about: str) -> str:
    return hashlib.sha256(about.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
