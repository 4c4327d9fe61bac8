"""Narrower MLPs in decode beside fewer blocks -> results/width.json.

`make bench-width`. Decode of SmolLM2-135M gets MLPs of fewer channels in all blocks, or loses the 6 blocks that greedy
search chooses, of about the same weights; prefill stays whole. Least squares refits what is left on calibration text:
Brown, or Brown and source code. Behind the latter both are then trained too: the same steps, rate and text for each.
Each is judged on development text of Brown and of source code behind the dense model's prompt KV: the loss of the
text's own next tokens, sequence by sequence, so that differences are paired. Each row is written down when it is made,
and the benchmark goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from typing import Any

import torch
from __narrow_mlps import NarrowPair, narrow
from __notes import Note, timed_notes
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.corpora import Split, registry
from pdtrim_deploy.evaluation.corpora.mixture import mixed
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.pruning.compensation import FitRules, get_compensation
from pdtrim_deploy.pruning.healing import StateFile, heal
from pdtrim_deploy.pruning.healing.stage_reader import PrefillKV, PromptKV, StageReader
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages
from pdtrim_deploy.recipe.healing import HealingSection

CASES: dict[str, dict[str, Any]] = {
    "dense": {"treatment": "none"},
    "6 blocks": {"blocks": 6},
    "width 1126": {"width": 1126},
    "6 blocks, trained": {"blocks": 6, "treatment": "trained"},
    "width 1126, trained": {"width": 1126, "treatment": "trained"},
}
"""What decode loses: blocks, channels (a `width` is what stays of 1536), and what is done then."""
TEXTS = {"Brown": ("brown",), "Brown and code": ("brown", "code")}
"""Corpora in equal parts, of their calibration splits."""
MEASURED = {"Brown": ("dense", "6 blocks", "width 1126"), "Brown and code": (*CASES,)}
"""Cases of each text."""
CORPORA = ("brown", "code")
PLACE = HERE.parent / "out" / "bench-width"
BATCH = 4
_OPTIONS = (
    "calibration",
    "sequences",
    "length",
    "prompt",
    "searched",
    "share",
    "steps",
    "rate",
    "trained",
    "read",
    "seed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=16, help="sequences that least squares and channels are of")
    parser.add_argument("--searched", type=int, default=4, help="of them, for the search of blocks")
    parser.add_argument(
        "--share", type=float, default=1.0, help="what a token of a prompt counts where blocks are refitted"
    )
    parser.add_argument("--sequences", type=int, default=16, help="judged, of each corpus")
    parser.add_argument("--length", type=int, default=384, help="tokens of each, of both")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of its prompt, where it is judged")
    parser.add_argument("--trained", type=int, default=128, help="sequences that training reads")
    parser.add_argument("--read", type=int, default=256, help="tokens of each of these; half is prompt")
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--rate", type=float, default=1e-4, help="of learning")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    note = timed_notes()
    log = RowLog(PLACE / "rows.jsonl", [[name, getattr(options, name)] for name in _OPTIONS])
    for text, cases in MEASURED.items():
        missing = [name for name in cases if log.find(text=text, case=name) is None]
        if missing:
            bench = _Bench(options, text, note)
            for name in missing:
                log.append(bench.row(name))
    rows = [row for text, cases in MEASURED.items() for name in cases if (row := log.find(text=text, case=name))]
    write("width", options, rows)


class _Bench:
    """The dense model, and the text that chooses, fits, trains and judges."""

    def __init__(self, options: argparse.Namespace, text: str, note: Note) -> None:
        setting = hashlib.sha256(f"{commit()}, {vars(options)}".encode()).hexdigest()[:12]
        self._text_name, self._place = text, PLACE / setting / text.replace(" ", "-")
        self._cache, self._options, self._note = Cache.default(), options, note
        checkpoint = resolve(DEFAULT_SOURCE, self._cache, note)
        self._tokenizer, self._model = load_tokenizer(checkpoint.path), load_model(checkpoint.path)
        self._shape = checkpoint.shape("float32")
        self._ids = self._text(TEXTS[text], "calibration", options.calibration, options.length)
        self._judged = {name: self._text((name,), "development", options.sequences, options.length) for name in CORPORA}
        self._held = dict[bytes, list[LayerKV]]()
        self._prefill = PrefillKV(self._model, tuple(range(self._shape.num_blocks)))

    def row(self, name: str) -> dict[str, Any]:
        """Each judged sequence's loss, nats a token, by corpus; decode's weights, and those that a token reads."""
        case, began = CASES[name], time.process_time()
        pair, report = self._pair(**case)
        row = {
            "text": self._text_name,
            "case": name,
            **case,
            "removed": sorted(set(range(self._shape.num_blocks)) - {*pair.plan.layers("decode")}),
        }
        row |= {"cpu_s": round(time.process_time() - began), "commit": commit()}
        row |= {"parameters": sum(p.numel() for p in pair.stage("decode").parameters()), "report": report}
        for corpus, ids in self._judged.items():
            row[corpus] = self._losses(pair, ids)
        self._note(f"{name}: {[round(sum(row[c]) / len(row[c]), 4) for c in CORPORA]}, {row['cpu_s']} CPU-s")
        return row

    def _pair(
        self, blocks: int = 0, width: int = 0, treatment: str = "refitted"
    ) -> tuple[StagePair, dict[str, Any] | None]:
        """Without training: what least squares change is read where it was made before."""
        options, removed = self._options, self._removed(blocks)
        actions = Solution.of(removed).actions(self._shape.num_blocks)
        pair: StagePair = NarrowPair(
            self._model, PDPlan.uncut(self._shape, Solution.of(()).actions(self._shape.num_blocks), actions)
        )
        if treatment == "none":
            return pair, None
        file = self._place / f"{blocks}-{width}.safetensors"
        if not file.exists():
            if width:
                fitted: StagePair = narrow(pair, width, self._ids, self._note)
            else:
                rules = FitRules(prompt_share=options.share)
                fitted = get_compensation("least-squares", rules).compensate(pair, "decode", self._ids, self._note)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_blocks(fitted.changed["decode"], file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        pair = pair.with_changes("decode", read_blocks(file))
        if treatment != "trained":
            return pair, None
        section = HealingSection(
            decode_steps=options.steps, learning_rate=options.rate, sweep=(1.0,), batch=BATCH, seed=options.seed
        )
        ids = self._text(TEXTS[self._text_name], "calibration", options.trained, options.read)
        state = StateFile(file.with_suffix(".state"), f"{commit()}, {vars(options)}")
        healed = heal(pair, "decode", ids, section, self._note, file=state, clock=time.process_time)
        file.with_suffix(".state").unlink(missing_ok=True)
        return healed.pair, healed.report

    def _removed(self, blocks: int) -> tuple[Any, ...]:
        """Those that greedy search takes from decode."""
        if not blocks:
            return ()
        inputs = SearchInputs(self._model, self._ids[: self._options.searched], Greedy(), folder=self._place / "search")
        return choose_stages(inputs, 0, blocks, self._options.prompt, self._note).decode.removed

    @torch.no_grad()
    def _losses(self, pair: StagePair, ids: Tensor) -> list[float]:
        prompt, losses = self._options.prompt, list[Tensor]()
        sources = [source for source in pair.plan.kv_sources if source is not None]

        def held(prompts: Tensor) -> list[LayerKV]:
            key = prompts.numpy().tobytes()
            if key not in self._held:
                self._held[key] = self._prefill(prompts)
            return [self._held[key][source] for source in sources]

        prompt_kv = PromptKV(prompt, held)
        reader = StageReader(pair, "decode", pair.stage("decode"), prompt_kv)
        for part in ids.split(BATCH):
            losses.append(-reader.runner.logprobs(reader.hidden(part)[:, :-1], part[:, prompt + 1 :]).double().mean(1))
        return [round(x, 6) for x in torch.cat(losses).tolist()]

    def _text(self, corpora: tuple[str, ...], split: Split, count: int, length: int) -> Tensor:
        parts = [(registry.load(name, self._cache, self._note).split(split), 1.0) for name in corpora]
        return mixed(parts, self._tokenizer, count, length, self._options.seed)


if __name__ == "__main__":
    main()
