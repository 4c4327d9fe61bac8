"""The recipe's section on prompt KV: the method that chooses what travels, and its options."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pdtrim_deploy.plan.kv import KVSend
from pdtrim_deploy.plan.wire import SIDES, SMALLER_THAN_FP8, PoolDtype, WireDtype
from pdtrim_deploy.recipe.recall_bounds import fits

# Names of a registry that needs torch to import; a test checks that they are equal.
KVMethod = Literal["none", "all", "random", "attention-mass", "simlayerkv", "measured-harm", "budget"]
KV_METHODS: tuple[str, ...] = get_args(KVMethod)
FIXED_KV = ("none", "all")  # choose without looking at the model
WINDOWS_KV = ("none", "all", "measured-harm", "budget")  # leave layers with sliding windows, which cannot be cut, alone

_SIZES = ("n_first", "n_last", "wire_dtype")
_TAKES: dict[str, tuple[str, ...]] = {
    "none": ("wire_dtype",),
    "all": _SIZES,
    "random": (*_SIZES, "sparse_layers"),
    "attention-mass": (*_SIZES, "sparse_layers", "threshold"),
    "simlayerkv": (*_SIZES, "sparse_layers", "threshold"),
    "measured-harm": (*_SIZES, "sparse_layers", "recall"),
    "budget": ("reduction", "max_loss", "sparse_choices", "wire_choices", "recall"),
}
_ALL_TAKE = ("method", "sequences", "prompt_tokens", "continuation_tokens", "key_offsets")


class KVSection(BaseModel):
    """Which decode layers get only the first and last prompt tokens' KV, and the dtypes on the wire.

    Chosen on `sequences` of calibration text, each a prompt and its continuation.

    Attributes:
        sparse_layers: how many layers are cut to `n_first` + `n_last` tokens.
        threshold: instead of sparse_layers: cut the layers whose share of attention on these tokens is at least this.
        reduction: method budget: dense over planned bytes to reach at `prompt_tokens`.
        max_loss: instead of reduction: fewest bytes whose relative rise of perplexity (calibration text) is below this.
        sparse_choices: method budget: pairs (n_first, n_last) that a layer may be cut to.
        wire_choices: method budget: dtypes that a layer may travel in; those that the head size does not allow are
            skipped, as are those that make rows of an fp8 pool no smaller.
        recall: share of the sequences whose end repeats a passage of their middle, so that the harm also covers
            prompts that are searched for a fact (`kvchoice/recall.py`).
        key_offsets: subtract the mean key, measured on the prompts, from quantised keys, in the KV heads where this
            lowers the error (`kvcache/key_offsets.py`).
        pool_dtype: of both workers' KV pools, SGLang's `--kv-cache-dtype`; native: `model.dtype`. What is chosen, is
            chosen on rows that such pools hold.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: KVMethod = "none"
    sparse_layers: NonNegativeInt = 0
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    n_first: NonNegativeInt = 0
    n_last: NonNegativeInt = 0
    wire_dtype: WireDtype = "native"
    reduction: Annotated[float, Field(gt=1)] | None = None
    max_loss: Annotated[float, Field(gt=0)] | None = None
    sparse_choices: Annotated[
        tuple[Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)], ...], Field(strict=False)
    ] = ((4, 16), (4, 48), (4, 96), (4, 160), (4, 256), (4, 384))
    wire_choices: Annotated[tuple[WireDtype, ...], Field(strict=False, min_length=1)] = (
        "native",
        "int8",
        "int4",
        "k4v3",
        "int3",
    )
    recall: Annotated[float, Field(ge=0, le=1)] = 0.0
    sequences: PositiveInt = 8
    prompt_tokens: PositiveInt = 512
    continuation_tokens: Annotated[int, Field(ge=2)] = 64
    key_offsets: bool = True
    pool_dtype: PoolDtype = "native"

    @property
    def measures_offsets(self) -> bool:
        """Whether key offsets are on and some layer's keys may be quantised."""
        wires = self.wire_choices if self.method == "budget" else (self.wire_dtype,)
        return self.key_offsets and any(SIDES[wire][0] != "native" for wire in wires)

    def options(self) -> tuple[KVSend, ...]:
        """Options of a layer for method budget: every choice of rows in every wire dtype."""
        rows = [KVSend(), *(KVSend(mode="sparse", n_first=f, n_last=n) for f, n in self.sparse_choices)]
        return tuple(row.model_copy(update={"wire_dtype": wire}) for row in rows for wire in self.wire_choices)

    @model_serializer(mode="wrap")
    def _taken(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump only the keys of the method, so that other methods' defaults may change without changing recipes."""
        takes = (*_TAKES[self.method], *_ALL_TAKE, *(("pool_dtype",) if self.pool_dtype != "native" else ()))
        return {name: value for name, value in serialise(self).items() if name in takes}

    @model_validator(mode="after")
    def _meaningful(self) -> KVSection:
        takes = _TAKES[self.method]
        for name, field in type(self).model_fields.items():
            if name not in (*takes, *_ALL_TAKE, "pool_dtype") and getattr(self, name) != field.default:
                known = ", ".join(takes)
                raise ValueError(f"method is {self.method!r}, which takes no {name}; allowed with it: {known}")
        if "n_first" in takes and self.n_first + self.n_last == 0:
            raise ValueError(f"method is {self.method!r}; allowed with it: n_first + n_last of at least 1")
        if "sparse_layers" in takes and (self.sparse_layers == 0) == (self.threshold is None):
            either = " or a threshold" if "threshold" in takes else ""
            raise ValueError(f"method is {self.method!r}; allowed with it: sparse_layers of at least 1{either}")
        if self.method == "budget":
            if (self.reduction is None) == (self.max_loss is None):
                raise ValueError("method is 'budget'; allowed with it: either reduction or max_loss")
            if any(first + last == 0 for first, last in self.sparse_choices):
                raise ValueError("sparse_choices has a pair of zeros; allowed: n_first + n_last of at least 1")
        wires = self.wire_choices if self.method == "budget" else (self.wire_dtype,)
        if self.pool_dtype != "native" and not set(wires) & set(SMALLER_THAN_FP8):
            raise ValueError(
                f"pool_dtype is {self.pool_dtype}, whose rows travel as they are in a byte a value, no more than in "
                f"{', '.join(wires)}; allowed with it: {', '.join(SMALLER_THAN_FP8)}"
            )
        if self.recall and not fits(self.prompt_tokens, self.continuation_tokens):
            raise ValueError(
                f"recall is {self.recall:g}, but {self.prompt_tokens} prompt tokens have no passage long enough for "
                f"{self.continuation_tokens} tokens of continuation; allowed with it: longer prompts, or recall: 0"
            )
        if self.method not in FIXED_KV and self._most_kept() >= self.prompt_tokens:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens}; allowed: more than n_first + n_last = {self._most_kept()}, "
                f"or nothing would be cut"
            )
        return self

    def _most_kept(self) -> int:
        if self.method == "budget":
            return max((sum(pair) for pair in self.sparse_choices), default=0)
        return self.n_first + self.n_last
