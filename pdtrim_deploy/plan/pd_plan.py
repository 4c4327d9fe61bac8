"""What was decided: which blocks each stage keeps, and which prompt KV travels. Pure data: no torch.

Blocks are always named by their index in the original model. A *layer* is a block's place in a stage model:
layer `j` of the decode model is block `plan.decode_layers[j]`. A *KV layer* is a layer's place among those of its stage
that have K and V, which is its place in the stage's KV pool: all but those without attention.

Source of the rules: PDTrim (arXiv:2509.04467v1 to v3), removal sets nested across stages and token-aware KV sending.
Its v4 has no KV pruning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.blocks import (
    KV_ONLY_SHARE,
    SUBLAYER_SHARES,
    Action,
    Distilled,
    Drop,
    Frozen,
    Keep,
    KVOnly,
    Sublayer,
    WithoutAttention,
    WithoutMLP,
    check_kv_of,
    check_pairs,
    missing_sublayer,
)
from pdtrim_deploy.plan.experts import KeptExperts
from pdtrim_deploy.plan.kv import KeyOffsetsFile, KVSend
from pdtrim_deploy.plan.wire import (
    FP8_ROWS,
    HEAD_DIM_MULTIPLE,
    LATENT_SIDES,
    SIDES,
    SMALLER_THAN_FP8,
    Code,
    PoolDtype,
    Vectors,
    WireDtype,
    side_bytes,
)

__all__ = [
    "STAGES",
    "Action",
    "Distilled",
    "Drop",
    "KVOnly",
    "KVSend",
    "Keep",
    "KeyOffsetsFile",
    "ModelShape",
    "NativeDtype",
    "PDPlan",
    "Stage",
    "Sublayer",
    "WithoutAttention",
    "WithoutMLP",
]

NativeDtype = Literal["float32", "bfloat16", "float16"]
Stage = Literal["prefill", "decode"]
Window = Annotated[int, Field(ge=2)]
STAGES: tuple[Stage, ...] = ("prefill", "decode")


class ModelShape(Frozen):
    """What the plan must know of the model, and of the KV pools that it is served with.

    Attributes:
        kv_dtype: what the model computes in; a native pool's dtype.
        pool_dtype: of both stages' KV pools; absent from JSON, and so from digests, when native.
        windows: by block, how many tokens a query attends to, itself among them; None: to all before it. Absent from
            JSON, and empty, where no block has a window.
        rope_dim: of a model with latent attention (MLA), numbers of a token's rope key. `head_dim` is then the size of
            its latent, of which there is one a token for all heads: `num_kv_heads` is 1. Absent from JSON, and None, of
            other models.

    """

    architecture: str
    fingerprint: str
    num_blocks: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    kv_dtype: NativeDtype
    pool_dtype: PoolDtype = "native"
    windows: tuple[Window | None, ...] = ()
    rope_dim: PositiveInt | None = None

    @model_serializer(mode="wrap")
    def _without_native(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans of native pools, of models without windows or latents, read as they did before there were others."""
        absent = {"pool_dtype": self.pool_dtype == "native", "windows": not self.windows}
        absent["rope_dim"] = self.rope_dim is None
        return {key: value for key, value in serialise(self).items() if not absent.get(key)}

    @model_validator(mode="after")
    def _windows_of_blocks(self) -> ModelShape:
        if self.windows and len(self.windows) != self.num_blocks:
            raise ValueError(f"windows has {len(self.windows)} entries, the model {self.num_blocks} blocks")
        if self.windows and not any(self.windows):
            raise ValueError("windows has no window; leave it out")
        return self

    @model_validator(mode="after")
    def _one_latent(self) -> ModelShape:
        if self.rope_dim is None:
            return self
        if self.num_kv_heads != 1 or self.windows:
            raise ValueError("a model with latents has one KV head, and no windows")
        if self.rope_dim % 2 or self.head_dim % 2:
            raise ValueError(f"a latent of {self.head_dim} and a rope key of {self.rope_dim} do not travel in halves")
        return self

    def vectors(self, kv_heads: int | None = None) -> tuple[Vectors, Vectors]:
        """What a token's K and V consist of in a layer, or its rope key and latent, of a rank with `kv_heads` heads."""
        if self.rope_dim is not None:
            return Vectors(2, self.rope_dim // 2), Vectors(2, self.head_dim // 2)
        return (Vectors(kv_heads or self.num_kv_heads, self.head_dim),) * 2

    def codes(self, wire_dtype: WireDtype) -> tuple[Code, Code]:
        """The codes of both; a rope key of an fp8 pool travels as it is, which is smaller than int8."""
        if self.rope_dim is None:
            return SIDES[wire_dtype]
        rope, latent = LATENT_SIDES[wire_dtype]
        return rope if self.pool_dtype == "native" else "native", latent

    def misfit(self, wire_dtype: WireDtype) -> str:
        """Why rows cannot travel in a wire dtype, in one clause; empty when they can."""
        if self.rope_dim is None:
            multiple = HEAD_DIM_MULTIPLE[wire_dtype]
            fits = self.head_dim % multiple == 0
            return "" if fits else f"needs a head size that is a multiple of {multiple}, the model's is {self.head_dim}"
        if wire_dtype not in LATENT_SIDES:
            return f"gives keys and values other codes, and a latent is both: use {', '.join(LATENT_SIDES)}"
        least = 2 * HEAD_DIM_MULTIPLE[wire_dtype]
        if self.head_dim % least or (wire_dtype != "native" and self.rope_dim % 4):
            return (
                f"needs a latent whose size is a multiple of {least} and a rope key of a multiple of 4, the model's "
                f"are {self.head_dim} and {self.rope_dim}"
            )
        return ""

    def suits(self, send: KVSend) -> bool:
        """Whether rows can travel in the wire dtype of `send`, and are smaller so than in the pool."""
        smaller = self.pool_dtype == "native" or send.wire_dtype in SMALLER_THAN_FP8
        return smaller and not self.misfit(send.wire_dtype)

    def packed_bytes(self, wire_dtype: WireDtype, rows: int, first: bool) -> int:
        """Bytes of K and V of `rows` rows of one layer as packed; `first`: prompt position 0 is among them."""
        both = zip(self.codes(wire_dtype), self.vectors(), strict=True)
        return sum(side_bytes(code, self.row_dtype, vectors, rows, first) for code, vectors in both)

    def window(self, block: int) -> int | None:
        """How many tokens a query of a block attends to; None: to all before it."""
        return self.windows[block] if self.windows else None

    def with_windows(self, windows: tuple[int | None, ...]) -> ModelShape:
        """The same model, had its blocks these windows; none where there is no entry."""
        return self.model_copy(update={"windows": windows})

    def rule(self, block: int, send: KVSend) -> KVSend:
        """What a rule means for a block: its wire dtype, and of a block with a window all rows that decode reads.

        Decode's first token stands behind the prompt and attends to itself, so it reads a row less than the window.
        """
        if (window := self.window(block)) is not None:
            return KVSend(mode="window", n_last=window - 1, wire_dtype=send.wire_dtype)
        return KVSend(wire_dtype=send.wire_dtype) if send.mode == "window" else send

    @property
    def row_dtype(self) -> str:
        """Torch's name of the dtype of a pool's rows, which `native` on the wire sends as they are."""
        return FP8_ROWS.get(self.pool_dtype, self.kv_dtype)

    def with_pool(self, pool_dtype: PoolDtype) -> ModelShape:
        """The same model served with other pools."""
        return self.model_copy(update={"pool_dtype": pool_dtype})


class PDPlan(Frozen):
    """The one contract between building and serving.

    Attributes:
        prefill, decode: one action per block of the original model.
        kv: one entry per KV layer of the decode model, in its order.
        key_offsets: constants that quantised keys travel without; absent from JSON, and so from the digest, when none.
        experts: which experts each stage keeps, where one has fewer than the model; absent from JSON when none.

    """

    version: Literal[1] = 1
    model: ModelShape
    prefill: tuple[Action, ...]
    decode: tuple[Action, ...]
    kv: tuple[KVSend, ...]
    key_offsets: KeyOffsetsFile | None = None
    experts: KeptExperts | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without key offsets, or with all experts, read as they did before there were others."""
        later = ("key_offsets", "experts")
        return {key: value for key, value in serialise(self).items() if key not in later or value is not None}

    @model_validator(mode="after")
    def _invariants(self) -> PDPlan:
        for stage in STAGES:
            actions = self.actions(stage)
            if len(actions) != self.model.num_blocks:
                raise ValueError(f"{stage} names {len(actions)} blocks, the model has {self.model.num_blocks}")
            check_pairs(stage, actions)
            if not self.layers(stage):
                raise ValueError(f"{stage} keeps no block")
        for block, (before, after) in enumerate(zip(self.prefill, self.decode, strict=True)):
            check_kv_of(block, before, after)
        if not self.decode_kv_blocks:
            raise ValueError("decode keeps no attention, so that it could not see the prompt")
        for block in self.decode_kv_blocks:
            if self._kv_source(block) is None:
                raise ValueError(f"decode block {block} has no prefill block to take its prompt KV from")
        if len(self.kv) != len(self.decode_kv_blocks):
            layers = "layers" if len(self.decode_layers) == len(self.decode_kv_blocks) else "layers with attention"
            raise ValueError(f"kv has {len(self.kv)} entries, decode keeps {len(self.decode_kv_blocks)} {layers}")
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if misfit := self.model.misfit(send.wire_dtype):
                raise ValueError(f"block {block}: wire dtype {send.wire_dtype} {misfit}")
        return self

    @model_validator(mode="after")
    def _windows_of_layers(self) -> PDPlan:
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if send != (rule := self.model.rule(block, send)):
                raise ValueError(f"block {block} {_misfit(self.model.window(block), rule)}")
        return self

    @model_validator(mode="after")
    def _fp8_pool(self) -> PDPlan:
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
    def _offsets_of_layers(self) -> PDPlan:
        if self.key_offsets is None:
            return self
        if (last := self.key_offsets.layers[-1]) >= len(self.kv):
            raise ValueError(f"key_offsets names layer {last}, decode has layers 0 to {len(self.kv) - 1}")
        if self.model.rope_dim is not None:
            raise ValueError("key_offsets are of keys, and a model with latents has none")
        if self.model.head_dim % 2:
            raise ValueError(f"key_offsets needs an even head size, the model's is {self.model.head_dim}")
        return self

    @model_validator(mode="after")
    def _experts_of_layers(self) -> PDPlan:
        if self.experts is not None:
            for stage in STAGES:
                self.experts.check_layers(stage, self.layers(stage))
        return self

    def actions(self, stage: Stage) -> tuple[Action, ...]:
        """The stage's action for every block."""
        return self.prefill if stage == "prefill" else self.decode

    def layers(self, stage: Stage) -> tuple[int, ...]:
        """Blocks of the stage model in order; a distilled pair stands at its first block."""
        return _layers(self.actions(stage))

    def kv_blocks(self, stage: Stage) -> tuple[int, ...]:
        """Blocks of the stage's KV layers: all that it runs but those without attention."""
        return _kv_blocks(self.actions(stage))

    def missing(self, stage: Stage) -> dict[int, Sublayer]:
        """By block, the sublayer that the stage runs it without; empty where it runs blocks whole."""
        lacks = ((block, missing_sublayer(action)) for block, action in enumerate(self.actions(stage)))
        return {block: sublayer for block, sublayer in lacks if sublayer is not None}

    def dropped(self, stage: Stage) -> tuple[int, ...]:
        """Blocks that the stage does not run at all."""
        return tuple(block for block, action in enumerate(self.actions(stage)) if action.kind == "drop")

    @cached_property
    def kv_only_layers(self) -> tuple[int, ...]:
        """Layers of the prefill model that run for their K and V alone."""
        return tuple(j for j, block in enumerate(self.prefill_layers) if self.prefill[block].kind == "kv_only")

    @property
    def prefill_share(self) -> float:
        """What prefill computes, of the unpruned model's blocks: a layer for its K and V alone is `KV_ONLY_SHARE`."""
        return (self._work("prefill") - (1 - KV_ONLY_SHARE) * len(self.kv_only_layers)) / self.model.num_blocks

    @property
    def decode_share(self) -> float:
        """What decode computes, of the unpruned model's blocks; a missing sublayer spares its `SUBLAYER_SHARES`."""
        return self._work("decode") / self.model.num_blocks

    def _work(self, stage: Stage) -> float:
        """Layers of the stage, less what missing sublayers spare of them."""
        return len(self.layers(stage)) - sum(SUBLAYER_SHARES[lost] for lost in self.missing(stage).values())

    @cached_property
    def prefill_layers(self) -> tuple[int, ...]:
        """Blocks of the prefill model in order."""
        return self.layers("prefill")

    @cached_property
    def decode_layers(self) -> tuple[int, ...]:
        """Blocks of the decode model in order."""
        return self.layers("decode")

    @cached_property
    def prefill_kv_blocks(self) -> tuple[int, ...]:
        """Blocks of prefill's KV layers."""
        return self.kv_blocks("prefill")

    @cached_property
    def decode_kv_blocks(self) -> tuple[int, ...]:
        """Blocks of decode's KV layers, in the order of `kv`."""
        return self.kv_blocks("decode")

    def _kv_source(self, block: int) -> int | None:
        action = self.decode[block]
        parent = action.kv_from if action.kind == "distilled" else block
        made_by = self.prefill[parent]
        if made_by.kind in ("keep", "kv_only", "without_mlp"):
            return self.prefill_kv_blocks.index(parent)
        if made_by.kind == "distilled" and made_by.kv_from == parent:
            return self.prefill_kv_blocks.index(made_by.pair[0])
        return None

    @cached_property
    def layer_map(self) -> tuple[int, ...]:
        """For each KV layer of decode, the KV layer of prefill whose prompt KV it reads."""
        return tuple(source for b in self.decode_kv_blocks if (source := self._kv_source(b)) is not None)

    @cached_property
    def kv_sources(self) -> tuple[int | None, ...]:
        """For each layer of decode, the layer of prefill whose prompt KV it reads; None for one without attention."""
        made_by = (self.prefill_layers.index(self.prefill_kv_blocks[source]) for source in self.layer_map)
        read = dict(zip(self.decode_kv_blocks, made_by, strict=True))
        return tuple(read.get(block) for block in self.decode_layers)

    def payload_bytes(self, prompt_tokens: int) -> int:
        """Exact bytes of packed KV that one request of `prompt_tokens` sends (no header, no aux row)."""
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
        `every_row` all rows, as SGLang does where it has none.
        """
        m = self.model if pool_dtype is None else self.model.with_pool(pool_dtype)
        reads = (prompt_tokens if every_row else m.rule(b, KVSend()).rows(prompt_tokens) for b in range(m.num_blocks))
        return m.packed_bytes("native", sum(reads), first=False)

    def reduction(self, prompt_tokens: int, pool_dtype: PoolDtype | None = None) -> float:
        """Dense bytes, of the plan's own kind of pool or another, over planned bytes."""
        return self.dense_bytes(prompt_tokens, pool_dtype) / self.payload_bytes(prompt_tokens)

    def reductions(self, prompt_tokens: int) -> str:
        """Both reductions that count, for readers: of a pool as the model computes, and of one of fp8."""
        native, fp8 = self.reduction(prompt_tokens, "native"), self.reduction(prompt_tokens, "fp8_e4m3")
        return f"{native:.2f}x less than dense from a {self.model.kv_dtype} pool, {fp8:.2f}x from an fp8 pool"

    def with_kv(self, kv: tuple[KVSend, ...]) -> PDPlan:
        """The same blocks with other KV rules, validated; of a block with a window they give the wire dtype alone."""
        if len(kv) == len(self.decode_kv_blocks):
            kv = tuple(map(self.model.rule, self.decode_kv_blocks, kv))
        return self.with_parts(kv=kv)

    def with_windows(self, windows: tuple[int | None, ...]) -> PDPlan:
        """The same plan, had the model's blocks these windows: each layer keeps its wire dtype."""
        model = self.model.with_windows(windows)
        kv = tuple(model.rule(block, send) for block, send in zip(self.decode_kv_blocks, self.kv, strict=True))
        return self.with_parts(model=model, kv=kv)

    def with_key_offsets(self, key_offsets: KeyOffsetsFile | None) -> PDPlan:
        """The same blocks and KV rules with other key offsets, or none; validated."""
        return self.with_parts(key_offsets=key_offsets)

    def with_parts(self, **parts: Any) -> PDPlan:
        """The same plan with other values of some attributes, validated (a `model_copy` would keep cached digests)."""
        return PDPlan(**({name: getattr(self, name) for name in type(self).model_fields} | parts))

    def kept_experts(self, stage: Stage) -> dict[int, tuple[int, ...]]:
        """By block, the experts that the stage keeps; empty where it keeps all."""
        return {} if self.experts is None else self.experts.by_block(stage)

    def has_key_offset(self, layer: int) -> bool:
        """Whether keys of this KV layer of decode travel less a constant: it has one, and its keys are quantised."""
        known = self.key_offsets is not None and layer in self.key_offsets.layers
        return known and SIDES[self.kv[layer].wire_dtype][0] != "native"

    def canonical_json(self) -> str:
        """The one text of this plan: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def __hash__(self) -> int:
        """Of the digest: a chunk's layout is looked up by its plan, many times a second."""
        return hash(self.digest)

    @classmethod
    def parse(cls, data: Any, where: str) -> PDPlan:
        """A plan from parsed JSON; UserError names `where` it came from and what is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: not a valid plan: {place + ': ' if place else ''}{first['msg']}") from None

    @classmethod
    def load(cls, path: Path) -> PDPlan:
        """Read plan.json; UserError when missing, not JSON, or against the invariants."""
        try:
            return cls.parse(json.loads(path.read_text()), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such plan; build the bundle first") from None
        except (ValueError, RecursionError) as error:  # of JSON, or of its bytes; nested without end
            raise UserError(f"{path}: not JSON ({error}); build the bundle again") from None

    @classmethod
    def dense(cls, model: ModelShape) -> PDPlan:
        """Nothing removed, everything sent: the control."""
        keep = (Keep(),) * model.num_blocks
        return cls.uncut(model, keep, keep)

    @classmethod
    def uncut(cls, model: ModelShape, prefill: tuple[Action, ...], decode: tuple[Action, ...]) -> PDPlan:
        """Stages that run these blocks, and are sent every row that decode reads."""
        kv = tuple(model.rule(block, KVSend()) for block in _kv_blocks(decode))
        return cls(model=model, prefill=prefill, decode=decode, kv=kv)


def _layers(actions: tuple[Action, ...]) -> tuple[int, ...]:
    """Blocks of a stage's model in order."""
    return tuple(
        block
        for block, action in enumerate(actions)
        if action.kind != "drop" and (action.kind != "distilled" or action.pair[0] == block)
    )


def _kv_blocks(actions: tuple[Action, ...]) -> tuple[int, ...]:
    """Those among them that have K and V."""
    return tuple(block for block in _layers(actions) if actions[block].kind != "without_attention")


def _misfit(window: int | None, rule: KVSend) -> str:
    """What is wrong with the rule of a block that should have `rule`."""
    if window is None:
        return "attends to all tokens, and sends no window"
    return f"attends to the last {window} tokens, and sends the last {rule.n_last} rows of a prompt, no others"
