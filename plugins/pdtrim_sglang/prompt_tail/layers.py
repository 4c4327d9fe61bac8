"""SGLang's last layers, which run tails of prompts whole, and other tokens for their K and V alone.

All tokens of a batch have run the layers before. When the first of these is called, K and V of the bodies are made in
all of them, from the one hidden state that is there; then the tails go on alone, and read them. Behind the last layer
the batch has all its rows again, in its order. Written against SGLang 0.5.23 (models/llama.py and those like it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from torch import Tensor

from pdtrim_sglang.prompt_tail.rows import BatchPart, Division
from pdtrim_sglang.prompt_tail.states import State, joined, together

CAPTURE = "capture_output"  # argument of a layer: who is to be given what it reads, for an EAGLE3 draft


class DividedLayers:
    """Takes the place of `forward` of decoder layers.

    Args:
        layers: SGLang's last decoder layers, with the model's own weights.
        bodies: as many, of which norm and attention alone are called: these write K and V (`kv_only.keep_only_kv`).
        division: how a batch that SGLang runs is divided; None: all its rows run the layers whole.

    """

    def __init__(
        self, layers: Sequence[Any], bodies: Sequence[Any], division: Callable[[Any], Division | None]
    ) -> None:
        self._bodies, self._division, self._last = bodies, division, len(layers) - 1
        self._signature = inspect.signature(layers[0].forward)
        self._body: State | None = None  # of the batch whose tails are between the first layer and the last
        for number, layer in enumerate(layers):
            layer.forward = partial(self._run, number, layer.forward)

    @property
    def captures(self) -> bool:
        """Whether layers are asked for what they read; else the model takes it from between them, where rows lack."""
        return CAPTURE in self._signature.parameters

    def _run(self, number: int, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._signature.bind(*args, **kwargs).arguments
        division = self._division(call["forward_batch"])
        if division is None:
            return whole(**call)
        if division.parts is None:
            return self._bodies_alone(number, call)
        return self._tails(number, whole, call, *division.parts)

    def _bodies_alone(self, number: int, call: dict[str, Any]) -> Any:
        batch = call["forward_batch"]
        state = State.of(call, batch)
        if number == 0:
            self._write_kv(call["positions"], state, batch)
        if call.get(CAPTURE) is not None:
            call[CAPTURE](state.added, owned=True)
        return self._result(state, batch)

    def _tails(
        self, number: int, whole: Callable[..., Any], call: dict[str, Any], body: BatchPart, tail: BatchPart
    ) -> Any:
        batch, changed, rows = call["forward_batch"], {"forward_batch": tail.batch}, (body.rows, tail.rows)
        if number == 0:
            state = State.of(call, batch)
            self._body = state.rows(body.rows)
            self._write_kv(call["positions"][body.rows], self._body, body.batch)
            changed |= self._known(state.rows(tail.rows).arguments(tail.batch))
        assert self._body is not None
        body_state = self._body
        if (capture := call.get(CAPTURE)) is not None:
            changed[CAPTURE] = lambda read, **_: capture(together((body_state.added, read), rows), owned=True)
        others = call.keys() - changed.keys() - {*State.ARGUMENTS}
        changed |= {name: _rows(call[name], tail.rows) for name in others}
        with forward_context(get_forward_context(), forward_batch=tail.batch):
            result = whole(**(call | changed))
        if number < self._last:
            return result
        self._body = None
        return self._result(joined((body_state, State.of(_arguments(result), tail.batch)), rows), batch)

    def _write_kv(self, positions: Tensor, state: State, batch: Any) -> None:
        hidden = state.added
        with forward_context(get_forward_context(), forward_batch=batch):
            for layer in self._bodies:
                layer.self_attn(positions=positions, hidden_states=layer.input_layernorm(hidden), forward_batch=batch)

    def _result(self, state: State, batch: Any) -> Any:
        arguments = self._known(state.arguments(batch))
        return tuple(arguments.values()) if len(arguments) > 1 else arguments["hidden_states"]

    def _known(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those that these layers have."""
        return {name: value for name, value in arguments.items() if name in self._signature.parameters}


def _arguments(result: Any) -> dict[str, Any]:
    """What a layer gives, as the next one is called with it."""
    return dict(zip(State.ARGUMENTS, result if isinstance(result, tuple) else (result,), strict=False))


def _rows(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) else value
