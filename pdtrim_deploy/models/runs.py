"""Whether a model of a family that we have no file of is what its config.json tells: run once on a few tokens.

Blocks run one by one, the prompt first and the rest behind its KV, must give the logits of the model's own forward
pass, and hold one row of K and one of V a token and KV head. So nothing need be known of such a model but that.
"""

from __future__ import annotations

from typing import Any

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.linear_attention import State, to_pool
from pdtrim_deploy.plan import LinearStates, ModelShape

MODULES = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
PROMPT, TOKENS = 9, 14
CLOSE = 1e-3  # of the largest logit: float32 in another order of sums


def check_modules(model: Any, where: str) -> None:
    """Raise UserError where a model, with or without weights, is not built as Llama's is."""
    for name in MODULES:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"{where}: architecture {type(model).__name__} is not supported: it has no module {name}, and only "
                "decoders built as Llama's can be run block by block"
            ) from None


@torch.no_grad()
def check_runs(model: Any, shape: ModelShape, where: str) -> None:
    """Raise UserError where blocks one by one are not the model, or hold other K and V, or states, than `shape`'s."""
    refused = f"{where}: architecture {type(model).__name__} is not supported"
    ids = torch.arange(3, 3 + TOKENS)[None] % model.config.vocab_size
    try:
        expected = model(ids, use_cache=False).logits[0].float()
        held, logits = _by_block(model, ids)
    except Exception as error:  # whatever its modules raise when they are called as Llama's
        reason = str(error).partition("\n")[0]
        raise UserError(f"{refused}: its blocks do not run one by one ({type(error).__name__}: {reason})") from error
    vectors, states = shape.vectors(), shape.states
    for layer, kv in enumerate(held):
        if states is not None and layer in states.blocks and kv.state is not None:
            _check_state(kv.state, states, f"{refused}: layer {layer}")
            continue
        shapes = [tuple(side.shape) if side is not None else () for side in (kv.keys, kv.values)]
        if shapes != [(1, heads, TOKENS, dim) for heads, dim in vectors]:
            sizes = dict.fromkeys(f"{heads} heads x {dim}" for heads, dim in vectors)
            raise UserError(
                f"{refused}: layer {layer} holds KV of {', '.join(map(str, sorted(set(shapes))))} for {TOKENS} tokens, "
                f"not one row of K and V each of {' and '.join(sizes)}"
            )
    apart = float((logits - expected).abs().max() / expected.abs().max())
    if not apart < CLOSE:
        raise UserError(
            f"{refused}: run block by block its logits differ by {apart:.1g} of the largest from those of its own "
            "forward pass, which does more between blocks than Llama's"
        )


def _check_state(state: State, states: LinearStates, refused: str) -> None:
    conv, recurrent = (tuple(side.shape[1:]) for side in to_pool(state, states, state[0].device))
    if (conv, recurrent) != (states.conv_shape(), states.recurrent_shape()):
        raise UserError(
            f"{refused} keeps a state of {conv} and {recurrent}, by config.json of {states.conv_shape()} and "
            f"{states.recurrent_shape()}"
        )


def _by_block(model: Any, ids: torch.Tensor) -> tuple[list[LayerKV], torch.Tensor]:
    """What each layer holds, and float32 logits `[tokens, vocabulary]`."""
    runner = Blockwise(model)
    held, logits = [LayerKV() for _ in runner.layers], []
    for start, part in ((0, ids[:, :PROMPT]), (PROMPT, ids[:, PROMPT:])):
        hidden, span = runner.embed(part, start)
        for layer, kv in enumerate(held):
            hidden = runner.block(layer, hidden, span, kv)
        logits.append(runner.logits(hidden)[0].float())
    return held, torch.cat(logits)
