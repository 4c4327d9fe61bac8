"""Which prompt rows of each decode layer travel and in which dtype, and their exact bytes."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import model_validator

from pdtrim_deploy.plan.kv import KeyOffsetsFile, KVSend
from pdtrim_deploy.plan.stage_blocks import StageBlocks
from pdtrim_deploy.plan.wire import SIDES, SMALLER_THAN_FP8, PoolDtype


class KVRules(StageBlocks):
    """The blocks of both stages, and what each KV layer of decode is sent.

    Attributes:
        kv: one entry per KV layer of the decode model, in its order.
        key_offsets: constants that quantised keys travel without; absent from JSON, and so from the digest, when none.

    """

    kv: tuple[KVSend, ...]
    key_offsets: KeyOffsetsFile | None = None

    @model_validator(mode="after")
    def _rules_of_layers(self) -> KVRules:
        if len(self.kv) != len(self.decode_kv_blocks):
            layers = "layers" if len(self.decode_layers) == len(self.decode_kv_blocks) else "layers with attention"
            raise ValueError(f"kv has {len(self.kv)} entries, decode keeps {len(self.decode_kv_blocks)} {layers}")
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if misfit := self.model.misfit(send.wire_dtype):
                raise ValueError(f"block {block}: wire dtype {send.wire_dtype} {misfit}")
        return self

    @model_validator(mode="after")
    def _windows_of_layers(self) -> KVRules:
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if send != (rule := self.model.rule(block, send)):
                raise ValueError(f"block {block} {_misfit(self.model.window(block), rule)}")
        return self

    @model_validator(mode="after")
    def _fp8_pool(self) -> KVRules:
        if (pool := self.model.pool_dtype) == "native":
            return self
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if send.wire_dtype not in SMALLER_THAN_FP8:
                raise ValueError(
                    f"block {block}: wire dtype {send.wire_dtype} is no smaller than rows of a KV pool of {pool}, "
                    f"which travel as they are: use {', '.join(SMALLER_THAN_FP8)}"
                )
        return self

    @model_validator(mode="after")
    def _offsets_of_layers(self) -> KVRules:
        if self.key_offsets is None:
            return self
        if (last := self.key_offsets.layers[-1]) >= len(self.kv):
            raise ValueError(f"key_offsets names layer {last}, decode has layers 0 to {len(self.kv) - 1}")
        if self.model.rope_dim is not None:
            raise ValueError("key_offsets are of keys, and a model with latents has none")
        if self.model.head_dim % 2:
            raise ValueError(f"key_offsets needs an even head size, the model's is {self.model.head_dim}")
        return self

    def payload_bytes(self, prompt_tokens: int) -> int:
        """Exact bytes that one request of `prompt_tokens` sends: packed KV, and states (no header, no aux row)."""
        return self.kv_bytes(prompt_tokens) + self.model.state_bytes

    def kv_bytes(self, prompt_tokens: int) -> int:
        """The same of packed KV alone."""
        if prompt_tokens < 1:
            raise ValueError("a prompt has at least one token")
        return sum(self.layer_bytes(layer, prompt_tokens) for layer in range(len(self.kv)))

    def first_sent(self, reused_tokens: int) -> int:
        """The first prompt token of which any row may travel, where decode's full layers have those before it.

        A cut layer's rows travel for each request anew, from the prompt's first token on.
        """
        return 0 if any(send.mode == "sparse" for send in self.kv) else reused_tokens

    def reused_bytes(self, reused_tokens: int) -> int:
        """Bytes of packed KV that do not travel, since decode's full layers have the first tokens' rows."""
        full = (layer for layer, send in enumerate(self.kv) if send.mode == "full")
        return sum(self.layer_bytes(layer, reused_tokens) for layer in full) if reused_tokens else 0

    def layer_bytes(self, layer: int, prompt_tokens: int) -> int:
        """Exact bytes of K and V that travel for one KV layer of decode."""
        m, send = self.model, self.kv[layer]
        ranges = send.row_ranges(prompt_tokens)
        rows, first = sum(stop - start for start, stop in ranges), ranges[0][0] == 0
        return m.packed_bytes(send.wire_dtype, rows, first)

    def layer_cost(self, layer: int, prompts: Sequence[int]) -> int:
        """Bytes of a layer at the first of several prompt lengths, or what is as large a share of dense bytes there.

        That share is the largest at any of the lengths, so that costs that sum to no more than `1 / R` of the dense
        bytes at the first length make a reduction of R or more at each.
        """
        dense = self.dense_bytes(prompts[0])
        return max(-(-self.layer_bytes(layer, n) * dense // self.dense_bytes(n)) for n in prompts)

    def dense_bytes(self, prompt_tokens: int, pool_dtype: PoolDtype | None = None, *, every_row: bool = False) -> int:
        """Bytes that the unpruned model would send for the same prompt, from the plan's own kind of pool or another.

        Of blocks with windows it sends what decode reads, as SGLang does where it has a pool of windows; with
        `every_row` all rows, as SGLang does where it has none. States are part of it, as they are of what is planned.
        """
        m = self.model if pool_dtype is None else self.model.with_pool(pool_dtype)
        reads = (prompt_tokens if every_row else m.rule(b, KVSend()).rows(prompt_tokens) for b in m.kv_blocks)
        return m.packed_bytes("native", sum(reads), first=False) + m.state_bytes

    def reduction(self, prompt_tokens: int, pool_dtype: PoolDtype | None = None) -> float:
        """Dense bytes, of the plan's own kind of pool or another, over planned bytes."""
        return self.dense_bytes(prompt_tokens, pool_dtype) / self.payload_bytes(prompt_tokens)

    def reductions(self, prompt_tokens: int) -> str:
        """Both reductions that count, for readers: of a pool as the model computes, and of one of fp8."""
        native, fp8 = self.reduction(prompt_tokens, "native"), self.reduction(prompt_tokens, "fp8_e4m3")
        return f"{native:.2f}x less than dense from a {self.model.kv_dtype} pool, {fp8:.2f}x from an fp8 pool"

    def has_key_offset(self, layer: int) -> bool:
        """Whether keys of this KV layer of decode travel less a constant: it has one, and its keys are quantised."""
        known = self.key_offsets is not None and layer in self.key_offsets.layers
        return known and SIDES[self.kv[layer].wire_dtype][0] != "native"


def _misfit(window: int | None, rule: KVSend) -> str:
    """What is wrong with the rule of a block that should have `rule`."""
    if window is None:
        return "attends to all tokens, and sends no window"
    return f"attends to the last {window} tokens, and sends the last {rule.n_last} rows of a prompt, no others"
