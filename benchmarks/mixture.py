"""What the default calibration text changes, beside prose alone -> results/mixture.json. `make bench-mixture`.

The same recipes are built on equal numbers of sequences of Brown and of the default mixture (prose, code, questions,
recall), and judged on development text of each kind, and of recorded agent conversations, which neither has: perplexity
through the PD oracle in float32, sequence by sequence, so that differences are paired. Each row is written down when it
is made, and the benchmark goes on from there.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from __notes import Note, timed_notes
from __quality_plans import DENSE, MODELS, PLANS, built
from __results import HERE, commit, write
from torch import Tensor

from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.evaluation.corpora.sampling import sequences
from pdtrim_deploy.evaluation.perplexity import BATCH
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.pd_run import sequence_nll
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.recipe.calibration import DEFAULT_MIXTURE

TEXTS = {"brown": {"corpus": "brown"}, "mixture": {"mixture": [part.model_dump() for part in DEFAULT_MIXTURE]}}
"""What a build is calibrated on."""
CORPORA = (*(part.corpus for part in DEFAULT_MIXTURE), "agents")
CUTS = [[4, 28], [4, 60], [4, 124], [4, 188]]
"""First and last rows that a layer may keep, of prompts shorter than those of recipes."""
JUDGED = ("budget 4.95x", "blocks")
PLACE = HERE.parent / "out" / "bench-mixture"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--plans", nargs="+", default=[*JUDGED], choices=PLANS, metavar="PLAN")
    parser.add_argument("--calibration", type=int, default=12, help="sequences of 256 tokens that choose blocks")
    parser.add_argument("--fitted", type=int, default=32, help="sequences of 256 tokens that blocks are refitted on")
    parser.add_argument("--kv-sequences", type=int, default=10, help="sequences that choose what KV travels")
    parser.add_argument("--sequences", type=int, default=20, help="judged, of each corpus")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of prompt")
    parser.add_argument("--continuation", type=int, default=64, help="tokens judged behind it")
    options, note = parser.parse_args(), timed_notes()
    about = [[name, value] for name, value in vars(options).items() if name != "plans"]
    log = RowLog(PLACE / "rows.jsonl", about)
    for plan, text in [(DENSE, "brown"), *product(options.plans, TEXTS)]:  # nothing is chosen for dense
        if log.find(plan=plan, text=text) is None:
            log.append(_row(options, plan, text, note))
    write("mixture", options, [row for row in log.rows if row["plan"] in (DENSE, *options.plans)])


def _row(options: argparse.Namespace, plan: str, text: str, note: Note) -> dict[str, Any]:
    """Of one build: its plan, and each sequence's loss, nats a token, by corpus."""
    sections = {key: dict(section) for key, section in PLANS[plan].items()}
    sections["calibration"] = TEXTS[text] | {"sequences": options.calibration, "length": 256, "seed": 0}
    if sections["kv"]["method"] == "budget":
        sections["kv"] |= {"sequences": options.kv_sequences, "prompt_tokens": options.prompt, "sparse_choices": CUTS}
    if "healing" in sections:
        sections["healing"] |= {"sequences": options.fitted}
    note(f"{plan}, calibrated on {text}")
    with built(options.model, sections, PLACE, note) as bundle:
        oracle, tokenizer = oracle_of(bundle, note, None), load_tokenizer(bundle.prefill_dir)
        row: dict[str, Any] = {"model": options.model, "plan": plan, "text": text, "commit": commit()}
        for stage in STAGES:
            actions = enumerate(bundle.plan.actions(stage))
            row[stage] = [block for block, action in actions if action.kind == "drop"]
        for corpus in CORPORA:
            documents = registry.load(corpus, Cache.default(), note).split("development")
            length = options.prompt + options.continuation
            row[corpus] = _losses(oracle, sequences(documents, tokenizer, options.sequences, length, 0), options.prompt)
            note(f"{plan}, calibrated on {text}: judged on {corpus}")
    return row


def _losses(oracle: PDOracle, ids: Tensor, prompt: int) -> list[float]:
    scored = (oracle.score(oracle.prefill(part[:, :prompt]), part[:, prompt:]) for part in ids.split(BATCH))
    return [round(loss, 6) for part in scored for loss in sequence_nll(part).tolist()]


if __name__ == "__main__":
    main()
