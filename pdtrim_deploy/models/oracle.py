"""The PD oracle: what a plan does to a model, computed in one process with transformers.

The prefill model runs the prompt; its KV goes through the real pack -> bytes -> unpack; the decode model
continues at the original positions. In a sparse layer decode attends to the first, last and generated tokens, in one
with a window to the last, in a full layer to all; a layer with linear attention goes on from the
state that prefill has left. Where pools are fp8, attention of both stages reads rows as they were
rounded, its own tokens' among them, and queries are not rounded: so do SGLang's torch_native, and its Triton in decode.
The oracle is the judge of pruning, and the reference that served logprobs must match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.linear_attention import State, from_pool
from pdtrim_deploy.models.linear_attention import to_pool as state_to_pool
from pdtrim_deploy.models.pd_run import continuation_logprobs
from pdtrim_deploy.models.prompt_tail import tail_model
from pdtrim_deploy.models.sublayers import skip_sublayers
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Sublayer


@dataclass(frozen=True)
class PrefillState:
    """What prefill leaves behind for `batch` prompts of `tokens` tokens; plans that share prefill share it.

    Attributes:
        keys, values: one pool per KV layer of prefill, `[batch * tokens, kv_heads, head_dim]` (of latents as
            `plan.model.vectors` says), the pool's dtype, all on the device of the LM head; token `t` of prompt `b` lies
            in slot `b * tokens + t`.
        logits: `[batch, vocabulary]` after the last prompt token.
        states: of each layer with linear attention what SGLang's pool holds of it, as `linear_attention.to_pool` says.

    """

    batch: int
    tokens: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor
    states: tuple[State, ...] = ()

    def sequence(self, at: int) -> PrefillState:
        """That of prompt `at` alone; shares memory."""
        slots = slice(at * self.tokens, (at + 1) * self.tokens)
        keys, values = (tuple(pool[slots] for pool in pools) for pools in (self.keys, self.values))
        states = tuple((conv[at : at + 1], recurrent[at : at + 1]) for conv, recurrent in self.states)
        return PrefillState(1, self.tokens, keys, values, self.logits[at : at + 1], states)


class PDOracle:
    """Two stage models joined by a plan. Cheap to make: for another plan of the same blocks use `with_kv`.

    Args:
        prefill_model, decode_model: stage models with the plan's layers; they may share weights.
        plan: sublayers that it leaves out are skipped, whatever the models have there; its `row_dtype` is that of
            prompt KV in the pool and on the wire, whatever the models compute in. One with a tail needs a prefill
            model that was given the tail's (`prompt_tail.attach`).
        offsets: the plan's key offsets, of all KV heads; None when it has none.

    Raises:
        ValueError: a model's layers are not as many as the plan's, the offsets are not the plan's, or the tail's
            model is missing.

    """

    def __init__(
        self, prefill_model: CausalLM, decode_model: CausalLM, plan: PDPlan, offsets: KeyOffsets | None = None
    ) -> None:
        self.plan, self.offsets = plan, offsets
        if (None if offsets is None else offsets.file) != plan.key_offsets:
            raise ValueError("the key offsets are not the plan's")
        models = {"prefill": prefill_model, "decode": decode_model}
        for stage in STAGES:
            layers, planned = len(models[stage].model.layers), plan.layers(stage)
            if layers != len(planned):
                raise ValueError(f"the {stage} model has {layers} layers, the plan {len(planned)}")
            adds_nothing: dict[int, Sublayer] = dict.fromkeys(plan.kv_only_blocks if stage == "prefill" else (), "mlp")
            models[stage] = skip_sublayers(models[stage], planned, plan.missing(stage) | adds_nothing)
        tail = tail_model(prefill_model, plan)
        if tail is not None:
            tail = skip_sublayers(tail, plan.layers("prefill"), plan.missing("prefill"))
        self._tail = None if tail is None else Blockwise(tail)
        self.prefill_model, self.decode_model = models["prefill"], models["decode"]
        self._prefill, self.decode = Blockwise(self.prefill_model), Blockwise(self.decode_model)

    @property
    def fp8_pool(self) -> torch.dtype | None:
        """What both stages' rows are rounded to when they are written; None for a native pool."""
        model = self.plan.model
        return None if model.pool_dtype == "native" else getattr(torch, model.row_dtype)

    @property
    def decode_offsets(self) -> KeyOffsets | None:
        """What decode puts back: the plan's key offsets."""
        return self.offsets

    def parts_at_once(self, batch: int, tokens: int, kv_bytes: int) -> int:
        """How many batches of prompts may go side by side: as many as `kv_bytes` hold, and one at least.

        Prompt KV is there twice in the pool's dtype, while it is handed over, and once in the model's.
        """
        model, dtype = self.plan.model, self.decode_model.dtype
        rows = sum(heads * dim for heads, dim in model.vectors()) * tokens * batch
        pool = rows * getattr(torch, model.row_dtype).itemsize * (len(self._prefill.layers) + len(self.decode.layers))
        return max(1, kv_bytes // (pool + rows * dtype.itemsize * len(self.decode.layers)))

    def with_kv(self, kv: tuple[KVSend, ...]) -> PDOracle:
        """The same stage models with other KV rules; any `PrefillState` of the one serves the other."""
        return PDOracle(self.prefill_model, self.decode_model, self.plan.with_kv(kv), self.offsets)

    def with_windows(self, windows: tuple[int | None, ...]) -> PDOracle:
        """The same stage models, whose layers are sent the rows of other windows than they attend to."""
        return PDOracle(self.prefill_model, self.decode_model, self.plan.with_windows(windows), self.offsets)

    def with_offsets(self, offsets: KeyOffsets | None) -> PDOracle:
        """The same stage models and KV rules with other key offsets, or none."""
        plan = self.plan.with_key_offsets(None if offsets is None else offsets.file)
        return PDOracle(self.prefill_model, self.decode_model, plan, offsets)

    def prefill(self, prompts: Tensor) -> PrefillState:
        """Run prompts of equal length, int64 `[batch, tokens]`, through the prefill model."""
        return self.prefill_parts([prompts])[0]

    @torch.no_grad()
    def prefill_parts(self, parts: Sequence[Tensor]) -> list[PrefillState]:
        """`prefill` of each of `parts`, to the bit; all go through a block before any goes through the next."""
        dtype, home = getattr(torch, self.plan.model.row_dtype), self._prefill.home
        pools: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts]
        kept: list[list[State]] = [[] for _ in parts]
        runs = self.prompt_runs(parts)
        while runs[-1].running:
            kvs = [LayerKV(pool=self.fp8_pool) for _ in parts]
            for run in runs:
                run.advance(kvs)
            for pool, states, kv in zip(pools, kept, kvs, strict=True):
                if kv.state is not None and self.plan.model.states is not None:
                    states.append(state_to_pool(kv.state, self.plan.model.states, home))
                if kv.keys is not None and kv.values is not None:
                    pool.append((to_pool(kv.keys, dtype, home), to_pool(kv.values, dtype, home)))
        left = []
        for prompts, pool, states, hidden in zip(parts, pools, kept, runs[-1].states, strict=True):
            keys, values = zip(*pool, strict=True)
            logits = runs[-1].runner.logits(hidden[:, -1])
            batch, tokens = prompts.shape
            left.append(PrefillState(batch, tokens, keys, values, logits, tuple(states)))
        return left

    def prompt_runs(self, parts: Sequence[Tensor]) -> list[LayerRun]:
        """Prompts before prefill's first layer: all tokens, or those before the plan's tail and then the tail's.

        They go through each layer in this order, with the same K and V.
        """
        if self._tail is None:
            return [LayerRun(self._prefill, parts)]
        before = max(0, parts[0].shape[1] - self.plan.kv_only_tail)
        tails = LayerRun(self._tail, [part[:, before:] for part in parts], before)
        return [LayerRun(self._prefill, [part[:, :before] for part in parts]), tails] if before else [tails]

    @torch.no_grad()
    def hand_over(self, state: PrefillState) -> list[LayerKV]:
        """What each KV layer of decode holds after the transfer: exactly the rows that were sent.

        Behind them stands what each layer with linear attention holds.
        """
        keys, values = (
            [torch.full_like(pools[source], torch.nan) for source in self.plan.layer_map]  # a row not sent shows
            for pools in (state.keys, state.values)
        )
        layout, device = chunk_layout(self.plan, state.tokens), state.logits.device
        for slots in torch.arange(state.batch * state.tokens, device=device).view(state.batch, state.tokens):
            packed = pack(layout, state.keys, state.values, slots, offsets=self.offsets)
            unpack(layout, packed, keys, values, slots, self.decode_offsets)
        dtype, pool, held = self.decode_model.dtype, self.fp8_pool, []
        for send, k, v in zip(self.plan.kv, keys, values, strict=True):
            ranges = send.row_ranges(state.tokens)
            rows_k, rows_v = (_rows(side, state.batch, ranges, dtype) for side in (k, v))
            held.append(LayerKV(rows_k, rows_v, ranges, pool))
        return held + [LayerKV(state=from_pool(kept, dtype)) for kept in state.states]

    @torch.no_grad()
    def extend(self, ids: Tensor, start: int, held: list[LayerKV], branches: int = 1) -> Tensor:
        """Decode's last hidden states `[batch, tokens, hidden]` for `ids` at `start`; `held` grows.

        `branches`: as in `Blockwise.embed`.
        """
        kvs = [[kv] for kv in self.decode.by_layer(held)]
        return LayerRun(self.decode, [ids], start, branches).finish(kvs)[0]

    def score(self, state: PrefillState, continuations: Tensor) -> Tensor:
        """float32 `[batch, T]` on the host: log-probability of each token of `continuations`, int64 `[batch, T >= 1]`.

        The first token is judged by prefill's logits, as in PD serving; the others by decode, in one pass.
        """
        return self.score_parts([state], [continuations])[0]

    @torch.no_grad()
    def score_parts(self, states: Sequence[PrefillState], continuations: Sequence[Tensor]) -> list[Tensor]:
        """`score` of each part, to the bit: prompts of one length, continuations of one length.

        All go through a block before any goes through the next.
        """
        hidden = [state.logits for state in states]
        if continuations[0].shape[1] > 1:  # else prefill's own: nothing is handed over
            hidden = self.extend_parts([ids[:, :-1] for ids in continuations], states)
        return [
            continuation_logprobs(state.logits, self.decode, last, ids).cpu()
            for state, last, ids in zip(states, hidden, continuations, strict=True)
        ]

    @torch.no_grad()
    def extend_parts(self, parts: Sequence[Tensor], states: Sequence[PrefillState], branches: int = 1) -> list[Tensor]:
        """`extend` of each of `parts` behind the KV that its state hands over; all go through block by block."""
        held = zip(*(self.decode.by_layer(self.hand_over(state)) for state in states), strict=True)
        return LayerRun(self.decode, parts, states[0].tokens, branches).finish([list(kvs) for kvs in held])

    def logprobs(self, prompt: Tensor, continuation: Tensor) -> Tensor:
        """float32 `[T]`: log-probability of each token of `continuation` `[T]` after `prompt` `[N]`."""
        return self.score(self.prefill(prompt[None]), continuation[None])[0]

    @torch.no_grad()
    def top_logprobs(self, prompt: Tensor, continuation: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` likeliest tokens at each place of `continuation` `[T]`: ids, float32; both `[T, k]`, on the host."""
        state = self.prefill(prompt[None])
        tops = [_top(state.logits, k)]
        if len(continuation) > 1:
            hidden = self.extend(continuation[None, :-1], state.tokens, self.hand_over(state))
            tops += [_top(self.decode.logits(part), k) for part in hidden[0].split(self.decode.logits_step)]
        ids, values = zip(*tops, strict=True)
        return torch.cat(ids), torch.cat(values)

    @torch.no_grad()
    def greedy(self, prompt: Tensor, tokens: int) -> Tensor:
        """int64 `[tokens]` on the host: the likeliest continuation of `prompt` `[N]`, by token (no stop token)."""
        state = self.prefill(prompt[None])
        held, logits, chosen = self.hand_over(state), state.logits, []
        for position in range(state.tokens, state.tokens + tokens):
            chosen.append(logits.argmax(-1))
            if len(chosen) < tokens:
                logits = self.decode.logits(self.extend(chosen[-1][None], position, held)[:, -1])
        return torch.cat(chosen).cpu()


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` likeliest tokens of each row of logits, and their float32 log-probabilities, on the host."""
    top = logits.float().log_softmax(-1).topk(k)
    return top.indices.cpu(), top.values.cpu()


def to_pool(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[batch, heads, tokens, dim]` -> `[batch * tokens, heads, dim]`."""
    return tensor.transpose(1, 2).flatten(0, 1).to(device, dtype).contiguous()


def _rows(pool: Tensor, batch: int, ranges: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Tensor:
    """`[batch * tokens, heads, dim]` -> the rows of `ranges` as `[batch, heads, rows, dim]`."""
    tokens = pool.unflatten(0, (batch, -1))
    return torch.cat([tokens[:, lo:hi] for lo, hi in ranges], dim=1).transpose(1, 2).to(dtype)
