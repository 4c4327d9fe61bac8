"""Decode distilled behind the KV that a plan sends, for benchmarks/kv.py."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pdtrim_deploy.models.block_tensors import read_blocks, save_blocks
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pruning.healing import PromptKV, heal
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.recipe.healing import HealingSection

HEALED = (("ours, native wire", 4.95), ("ours", 10.0))
MORE = 128  # tokens behind each prompt


def healed(
    oracle: PDOracle, ids: Tensor, options: argparse.Namespace, folder: Path, note: Callable[[str], None]
) -> PDOracle:
    """`oracle` with a decode model that learnt on `ids`; its weights once made stay in `folder`."""
    sends = [send.model_dump() for send in oracle.plan.kv]
    file = folder / f"healed-{hashlib.sha256(json.dumps(sends).encode()).hexdigest()[:12]}.safetensors"
    pair = StagePair(oracle.prefill_model, oracle.plan)
    if not file.exists():
        prompt_kv = PromptKV(options.prompt, lambda prompts: oracle.hand_over(oracle.prefill(prompts)))
        section = HealingSection(kv_steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
        changed = heal(pair, "decode", ids, section, note, prompt_kv).pair.changed.get("decode", {})
        save_blocks(changed, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    pair = pair.with_changes("decode", read_blocks(file))
    return PDOracle(oracle.prefill_model, pair.stage("decode"), oracle.plan)
