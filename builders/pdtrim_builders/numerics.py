"""The numerics check: a graph in onnxruntime must match transformers on real prompts, else the build fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdtrim_builders.base import Numerics
from pdtrim_builders.graph.stage import StageModel
from pdtrim_builders.graph.widen import widened
from pdtrim_builders.prompts import PROMPTS
from pdtrim_builders.runtime_onnx import OnnxStage
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.plan import PDPlan

# Accepted relative errors, two to three times the worst measured on SmolLM2-135M: 2e-5, 8e-3, 0.22.
# A bfloat16 graph is computed in float32, from the weights that the reference has.
TOLERANCES = {"float32": 5e-5, "float16": 2e-2, "bfloat16": 5e-5, "int8": 0.5}
MOST_TOKENS = 384
logger = logging.getLogger(__name__)


def check_numerics(
    stage: StageModel,
    graph: Path,
    tolerance: float,
    prompts: Sequence[str] | None = None,
    threads: int = 2,
    dtype: str = "float32",
) -> Numerics:
    """Compare final hidden states and, for prefill, the packed KV of every layer that sends.

    The reference for packed KV is `kvcache.pack` of transformers' own cache. Prompts are cut to 384 tokens.
    A graph of dtype bfloat16 is computed in float32, with its own weights; so is then the reference.

    Raises UserError: an error above `tolerance`, or a result that is not finite; a prompt without tokens.
    """
    rounded = dtype == "bfloat16"
    tokenizer = load_tokenizer(stage.path)
    large = is_large(graph)
    logger.info("numerics check: loading model and graph")
    model = _reference(stage, dtype if rounded else None, large=large)
    engine = OnnxStage(widened(graph) if rounded else graph, threads=threads, mapped=large)
    measured, tokens = _Errors(), 0
    longest = min(MOST_TOKENS, stage.positions)
    for number, prompt in enumerate(prompts or PROMPTS):
        logger.info("numerics check: %d/%d prompts", number, len(prompts or PROMPTS))
        ids = torch.tensor(tokenizer(prompt)["input_ids"][:longest], dtype=torch.int64)
        if not len(ids):
            raise UserError("a prompt for the numerics check has no tokens")
        tokens += len(ids)
        _compare(stage, engine, model, ids, measured)
    result = Numerics(
        tolerance=tolerance,
        prompts=len(prompts or PROMPTS),
        tokens=tokens,
        hidden_error=measured.relative["hidden"],
        hidden_max_abs_error=measured.absolute["hidden"],
        kv_error=measured.relative.get("kv"),
        kv_max_abs_error=measured.absolute.get("kv"),
    )
    for name, error in measured.relative.items():
        if not error <= tolerance:  # also when it is NaN
            raise UserError(
                f"{stage.stage}: {name} differs from torch by {error:.2g} relative "
                f"({measured.absolute[name]:.2g} absolute), tolerance {tolerance:g}; do not serve this graph"
            )
    return result


def is_large(graph: Path) -> bool:
    """Whether its weights have a file of their own: it is then checked block by block, and not optimised."""
    return graph.with_name(graph.name + ".data").exists()


def _reference(stage: StageModel, rounded: str | None, *, large: bool) -> Any:
    """The model of transformers in float32, its weights `rounded` first; a large one a block at a time."""
    if large:
        return stream_model(read_checkpoint(stage.path), 1, rounded=rounded)[0]
    return load_model(stage.path, rounded or "float32").float()


def send_rows(stage: StageModel, prompt_tokens: int) -> dict[str, Tensor]:
    """The rows inputs of a whole prompt in one chunk, int64 each."""
    rules = {rule.rows_input: rule.send for rule in stage.sends}
    return {
        name: torch.cat([torch.arange(lo, hi) for lo, hi in send.row_ranges(prompt_tokens)])
        for name, send in rules.items()
    }


class _Errors:
    """Worst relative and absolute error seen, by what was compared."""

    def __init__(self) -> None:
        self.relative: dict[str, float] = {}
        self.absolute: dict[str, float] = {}

    def add(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Both `[tokens, values]`."""
        difference = (got.float() - expected).abs()
        rows = difference.amax(1) / expected.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        for seen, value in ((self.relative, rows.max().item()), (self.absolute, difference.max().item())):
            seen[name] = value if math.isnan(value) else max(seen.get(name, 0.0), value)


@torch.no_grad()
def _compare(stage: StageModel, engine: OnnxStage, model: object, ids: Tensor, measured: _Errors) -> None:
    count = len(ids)
    reference = model.model(ids[None], use_cache=True)  # type: ignore[attr-defined]
    got = engine.run(ids, torch.arange(count), send_rows(stage, count))
    measured.add("hidden", got.hidden, reference.last_hidden_state[0])
    if not stage.sends:
        return
    layers = [reference.past_key_values.layers[layer] for layer in stage.kv_layers]  # torch ran the others' zeros
    pools = [[side[0].transpose(0, 1).contiguous() for side in (layer.keys, layer.values)] for layer in layers]
    layout = chunk_layout(_plain(stage.plan), count)
    sent = pack(layout, [k for k, _ in pools], [v for _, v in pools], torch.arange(count)).view(torch.float32)
    values = stage.kv_heads * stage.head_dim
    packed = torch.cat([got.packed[rule.output].float().flatten(0, 1) for rule in stage.sends])
    measured.add("kv", packed, sent.view(-1, values))


def _plain(plan: PDPlan) -> PDPlan:
    """The same rows in float32, unquantised: the graph is judged before any codec."""
    kv = tuple(send.model_copy(update={"wire_dtype": "native"}) for send in plan.kv)
    shape = plan.model.model_copy(update={"kv_dtype": "float32"})
    return PDPlan(model=shape, prefill=plan.prefill, decode=plan.decode, kv=kv)
