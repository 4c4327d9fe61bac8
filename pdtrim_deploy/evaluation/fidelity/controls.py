"""Wrong plans: what a server that got one thing wrong would compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.experts import routers
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.linear_attention import State
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import KVSend, PDPlan, WithoutMLP
from pdtrim_deploy.plan.wire import SIDES

Sends = tuple[KVSend, ...]


def wrong_oracles(oracle: PDOracle, prompt_tokens: int) -> dict[str, PDOracle]:
    """Oracles by name that a right comparison tells apart from the plan's; the names depend on the plan alone."""
    plan = oracle.plan
    oracles = {name: oracle.with_kv(kv) for name, kv in controls(plan, prompt_tokens).items()}
    if plan.model.windows:
        less = (None if window is None else max(2, window - 1) for window in plan.model.windows)
        oracles["window - 1"] = oracle.with_windows(tuple(less))
    if plan.model.states is not None:
        oracles["convolution a token old"] = WrongStates(oracle, _a_token_old)
        if len(plan.model.states.blocks) > 1:
            oracles["states one layer off"] = WrongStates(oracle, lambda states: states[-1:] + states[:-1])
    if (offsets := oracle.offsets) is not None:
        used = [
            constants
            for layer, send in enumerate(plan.kv)
            if plan.has_key_offset(layer) and (constants := offsets.constants(layer, SIDES[send.wire_dtype][0]))
        ]
        if any(constants.mean.any() for constants in used):
            oracles["no key offsets"] = oracle.with_offsets(None)
        if any((constants.scale != 1).any() for constants in used):
            oracles["key scales left in"] = WrongScales(oracle)
    if plan.missing("decode") and (whole := [b for b, action in enumerate(plan.decode) if action.kind == "keep"]):
        cut = tuple(WithoutMLP() if b == whole[-1] else action for b, action in enumerate(plan.decode))
        oracles["an MLP more left out"] = PDOracle(
            oracle.prefill_model, oracle.decode_model, plan.with_parts(decode=cut), oracle.offsets
        )
    if plan.kv_only_tail:
        native = all(send.wire_dtype == "native" for send in plan.kv)  # else one token may be less than rounding
        name, tail = ("tail - 1", plan.kv_only_tail - 1) if native else ("half the tail", plan.kv_only_tail // 2)
        if tail or plan.read_blocks.issuperset(plan.kv_only_blocks):  # else it is no plan
            shorter = plan.with_parts(kv_only_tail=tail)
            oracles[name] = PDOracle(oracle.prefill_model, oracle.decode_model, shorter, oracle.offsets)
    if plan.kept_experts("decode"):
        oracles["experts one number off"] = PDOracle(
            oracle.prefill_model, _misnumbered(oracle.decode_model), plan, oracle.offsets
        )
    return oracles


class WrongScales(PDOracle):
    """The plan's oracle, but that decode does not divide keys by their scales again."""

    def __init__(self, oracle: PDOracle) -> None:
        super().__init__(oracle.prefill_model, oracle.decode_model, oracle.plan, oracle.offsets)
        self._means = None if oracle.offsets is None else oracle.offsets.unscaled()

    @property
    def decode_offsets(self) -> KeyOffsets | None:
        """The plan's means alone."""
        return self._means


class WrongStates(PDOracle):
    """The plan's oracle, but for the states that decode goes on from."""

    def __init__(self, oracle: PDOracle, change: Callable[[tuple[State, ...]], tuple[State, ...]]) -> None:
        super().__init__(oracle.prefill_model, oracle.decode_model, oracle.plan, oracle.offsets)
        self._change = change

    def hand_over(self, state: PrefillState) -> list[LayerKV]:
        """As `PDOracle.hand_over`, of changed states."""
        return super().hand_over(replace(state, states=self._change(state.states)))


def _a_token_old(states: tuple[State, ...]) -> tuple[State, ...]:
    """Convolutions that have not seen the prompt's last token."""
    return tuple((conv.roll(1, -1), recurrent) for conv, recurrent in states)


def controls(plan: PDPlan, prompt_tokens: int) -> dict[str, Sends]:
    """The wrong KV rules among them."""
    rules, right = {}, tuple(_counted(send, prompt_tokens) for send in plan.kv)
    if any(send.mode == "sparse" for send in plan.kv):
        rules["dense plan"] = tuple(KVSend(wire_dtype=send.wire_dtype) for send in plan.kv)
        for side in ("n_first", "n_last"):
            rules[f"{side} - 1"] = tuple(_less(send, side) for send in right)
        rules["share + 1 row"] = tuple(
            counted.model_copy(update={"n_last": counted.n_last + 1}) if send.share else send
            for counted, send in zip(right, plan.kv, strict=True)
        )
    else:
        short = max(1, prompt_tokens - 1)
        for name, first, last in (("first row missing", 0, short), ("last row missing", short, 0)):
            cut = KVSend(mode="sparse", n_first=first, n_last=last)
            rules[name] = tuple(cut.model_copy(update={"wire_dtype": send.wire_dtype}) for send in plan.kv)
    rules["native on the wire"] = tuple(send.model_copy(update={"wire_dtype": "native"}) for send in plan.kv)
    rules["rules one layer off"] = plan.kv[-1:] + plan.kv[:-1]
    return {name: kv for name, kv in rules.items() if plan.with_kv(kv).kv not in (plan.kv, right)}


def _misnumbered(model: CausalLM) -> CausalLM:
    """The stage whose routers mean, by each number, the expert before it: what wrong renumbering computes."""
    blocks = range(len(model.model.layers))
    rolled = {block: {name: row.roll(1, 0) for name, row in routers(model, block)} for block in blocks}
    return keep_blocks(model, blocks, rolled)


def _counted(send: KVSend, prompt_tokens: int) -> KVSend:
    """The same rows of a prompt of this length, a share of it as numbers."""
    first, last = send.edges(prompt_tokens)
    return send.model_copy(update={"n_first": first, "n_last": last, "share": 0}) if send.share else send


def _less(send: KVSend, side: str) -> KVSend:
    """One row less at one side, where that leaves a row."""
    size = getattr(send, side)
    return send.model_copy(update={side: size - 1}) if size and send.n_first + send.n_last > 1 else send
