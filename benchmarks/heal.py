"""Healing at equal CPU time, several ways -> results/heal.json.

`make bench-heal`. Decode of SmolLM2-135M loses the six blocks of 30 that greedy search chooses and prefill two
(benchmarks/pruning.py); least squares on calibration text (Brown) refits what is left. Then decode is healed by each
way in turn, from the same weights, on the same text, for the same CPU time, so that other programs do not count. Each
result is judged on development text of Brown behind half of each sequence as prompt: KL to the dense model and the loss
of the text's own next tokens, sequence by sequence, so that differences are paired. A way that is stopped goes on where
it was, and what is done is not done again.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from __notes import timed_notes
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import Split, registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.pd_run import sequence_nll
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.healing import StateFile, heal
from pdtrim_deploy.pruning.healing.stage_reader import PrefillKV, PromptKV, StageReader
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_run
from pdtrim_deploy.recipe.healing import HealingSection

REMOVED = {"prefill": (16, 17), "decode": (13, 14, 15, 16, 17, 18)}
WAYS: dict[str, dict[str, Any]] = {
    "logits, 1e-4": {"regression": 0.0, "learning_rate": 1e-4},  # as before hidden states were fitted
    "hidden states first, 1e-4": {"regression": 0.25, "learning_rate": 1e-4},
    "logits, 3e-4": {"regression": 0.0, "learning_rate": 3e-4},
    "hidden states first, 3e-4": {"regression": 0.25, "learning_rate": 3e-4},
    "LoRA, hidden states first, 1e-3": {"method": "lora", "regression": 0.25, "learning_rate": 1e-3},
}
PLACE = HERE.parent / "out" / "bench-heal"
_TEXT = ("minutes", "fitted", "length", "batch", "refitted", "sequences", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS, metavar="WAY")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU time of each way")
    parser.add_argument("--fitted", type=int, default=128, help="sequences of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence; half is prompt")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--refitted", type=int, default=32, help="sequences of it that least squares refits on")
    parser.add_argument("--sequences", type=int, default=32, help="judged")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    note = timed_notes()
    log = RowLog(PLACE / "rows.jsonl", [[name, getattr(options, name)] for name in _TEXT])
    missing = [name for name in ("dense", "unhealed", *options.ways) if log.find(**{"way": name}) is None]
    if missing:
        bench = _Bench(options, note)
        for name in missing:
            log.append(bench.row(name))
    rows = [row for name in ("dense", "unhealed", *WAYS) if (row := log.find(**{"way": name}))]
    options.ways = [row["way"] for row in rows]
    write("heal", options, rows)


class _Bench:
    """The refitted pair, the text that heals it and the text that judges it."""

    def __init__(self, options: argparse.Namespace, note: Any) -> None:
        cache = Cache.default()
        checkpoint = resolve(DEFAULT_SOURCE, cache, note)
        tokenizer, model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)

        def text(split: Split, count: int) -> Tensor:
            return sequences(
                registry.load("brown", cache, note).split(split), tokenizer, count, options.length, options.seed
            )

        self._options, self._note = options, note
        self._ids, self._judged = text("calibration", options.fitted), text("development", options.sequences)
        shape, actions = checkpoint.shape("float32"), {}
        for stage in STAGES:
            actions[stage] = tuple(Drop() if b in REMOVED[stage] else Keep() for b in range(shape.num_blocks))
        kept = shape.num_blocks - len(REMOVED["decode"])
        plan = PDPlan(model=shape, prefill=actions["prefill"], decode=actions["decode"], kv=(KVSend(),) * kept)
        self._pair = self._refitted(StagePair(model, plan))

    def row(self, name: str) -> dict[str, Any]:
        """What healing did, and each judged sequence's KL and loss, nats a token; `unhealed` is the pair as it was."""
        options = self._options
        if name in ("dense", "unhealed"):
            pair = (
                self._pair if name == "unhealed" else StagePair(self._pair.model, PDPlan.dense(self._pair.plan.model))
            )
            return {"way": name, "commit": commit()} | self._measures(pair)
        keys = {"decode_steps": 1_000_000, "minutes": options.minutes, "sweep": (1.0,)}
        keys |= {"batch": options.batch, "seed": options.seed}
        section = HealingSection(**{**keys, **WAYS[name]})
        about = f"{name}, {commit()}, {vars(options)}"
        place = PLACE / f"{list(WAYS).index(name)}.safetensors"
        file = StateFile(place, about)
        healed = heal(self._pair, "decode", self._ids, section, self._note, file=file, clock=time.process_time)
        row = {"way": name, "section": WAYS[name], "report": healed.report, "commit": commit()}
        row |= self._measures(healed.pair)
        place.unlink(missing_ok=True)
        return row

    def _refitted(self, pair: StagePair) -> StagePair:
        ids = self._ids[: self._options.refitted]
        for stage in STAGES:
            file = PLACE / f"refitted-{len(ids)}x{ids.shape[1]}-{self._options.seed}-{stage}.safetensors"
            if not file.exists():
                changed = get_compensation("least-squares").compensate(pair, stage, ids, self._note).changed[stage]
                file.parent.mkdir(parents=True, exist_ok=True)
                save_blocks(changed, file.with_suffix(".part"))
                file.with_suffix(".part").rename(file)
            pair = pair.with_changes(stage, read_blocks(file))
        return pair

    def _measures(self, pair: StagePair) -> dict[str, list[float]]:
        ids = self._judged
        prompt_kv = PromptKV(ids.shape[1] // 2, PrefillKV(pair.stage("prefill"), pair.plan.layer_map))
        kl = StageReader(pair, "decode", pair.stage("decode"), prompt_kv).divergences(ids, self._options.batch)
        with torch.no_grad():
            loss = torch.cat([sequence_nll(part) for part in pd_run(pair, ids).logprobs()]).tolist()
        return {"kl": [round(x, 6) for x in kl.tolist()], "loss": [round(x, 6) for x in loss]}


if __name__ == "__main__":
    main()
