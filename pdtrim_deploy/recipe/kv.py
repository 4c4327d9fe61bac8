"""The recipe's section on prompt KV: the method that chooses what travels, and its options."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pdtrim_deploy.plan.kv import SHARE_UNIT, KVSend
from pdtrim_deploy.plan.wire import SIDES, SMALLER_THAN_FP8, PoolDtype, WireDtype
from pdtrim_deploy.recipe.recall_bounds import fits
from pdtrim_deploy.recipe.section import Section

# Names of a registry that needs torch to import; a test checks that they are equal.
KVMethod = Literal["none", "all", "random", "attention-mass", "simlayerkv", "measured-harm", "budget"]
KV_METHODS: tuple[str, ...] = get_args(KVMethod)
FIXED_KV = ("none", "all")  # choose without looking at the model
WINDOWS_KV = ("none", "all", "measured-harm", "budget")  # leave layers with sliding windows, which cannot be cut, alone

_SIZES = ("n_first", "n_last", "share", "wire_dtype")
_TAKES: dict[str, tuple[str, ...]] = {
    "none": ("wire_dtype",),
    "all": _SIZES,
    "random": (*_SIZES, "sparse_layers"),
    "attention-mass": (*_SIZES, "sparse_layers", "threshold"),
    "simlayerkv": (*_SIZES, "sparse_layers", "threshold"),
    "measured-harm": (*_SIZES, "sparse_layers", "recall", "longer_prompts"),
    "budget": ("reduction", "max_loss", "sparse_choices", "wire_choices", "recall", "longer_prompts"),
}
_LATER = {"share": 0, "longer_prompts": (), "pool_dtype": "native"}  # absent from recipes that have these values
LEAST_PROMPT = 4  # tokens that can be halved where each half needs two
MOST_SHARE = 1000  # of SHARE_UNIT; of more, short prompts lose no row, and no check could see the cut
_ALL_TAKE = ("method", "sequences", "prompt_tokens", "continuation_tokens", "key_offsets")


_Rows = Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=2, max_length=3)]


class KVSection(Section):
    """Which decode layers get only the first and last prompt tokens' KV, and the dtypes on the wire.

    Chosen on `sequences` of calibration text, each a prompt and its continuation.

    Attributes:
        sparse_layers: how many layers are cut to `n_first` + `n_last` tokens.
        share: rows of a cut layer as a share of the prompt, in 1024ths; `n_first` + `n_last` is then the least number.
        threshold: instead of sparse_layers: cut the layers whose share of attention on these tokens is at least this.
        reduction: method budget: dense over planned bytes to reach at `prompt_tokens`.
        max_loss: instead of reduction: fewest bytes whose relative rise of perplexity (calibration text) is below this.
        sparse_choices: method budget: (n_first, n_last) or (n_first, n_last, share) that a layer may be cut to.
        wire_choices: method budget: dtypes that a layer may travel in; those that the head size does not allow are
            skipped, as are those that make rows of an fp8 pool no smaller.
        longer_prompts: prompt lengths beyond `prompt_tokens` at which effects are measured as well, each on as many
            sequences: the mean harm over all lengths counts, and the reduction is reached at each of them.
        recall: share of the sequences whose end repeats a passage of their middle, so that the harm also covers
            prompts that are searched for a fact (`kvchoice/recall.py`).
        key_offsets: subtract the mean key from keys that are quantised, and scale their channels by what queries read
            of them; both are measured on the prompts, and left out in KV heads where they do not lower the error
            (`kvcache/key_offsets.py`).
        pool_dtype: of both workers' KV pools, SGLang's `--kv-cache-dtype`; native: `model.dtype`. What is chosen, is
            chosen on rows that such pools hold.

    """

    method: KVMethod = "none"
    sparse_layers: NonNegativeInt = 0
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    n_first: NonNegativeInt = 0
    n_last: NonNegativeInt = 0
    share: Annotated[int, Field(ge=0, le=MOST_SHARE)] = 0
    wire_dtype: WireDtype = "native"
    reduction: Annotated[float, Field(gt=1)] | None = None
    max_loss: Annotated[float, Field(gt=0)] | None = None
    sparse_choices: Annotated[tuple[_Rows, ...], Field(strict=False)] = (
        (4, 16),
        (4, 48),
        (4, 96),
        (4, 160),
        (4, 256),
        (4, 384),
    )
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
    longer_prompts: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    continuation_tokens: Annotated[int, Field(ge=2)] = 64
    key_offsets: bool = True
    pool_dtype: PoolDtype = "native"

    @property
    def prompts(self) -> tuple[int, ...]:
        """All prompt lengths at which effects are measured, ascending."""
        return (self.prompt_tokens, *self.longer_prompts)

    @property
    def measures_offsets(self) -> bool:
        """Whether key offsets are on and some layer's keys may be quantised."""
        wires = self.wire_choices if self.method == "budget" else (self.wire_dtype,)
        return self.key_offsets and any(SIDES[wire][0] != "native" for wire in wires)

    def options(self) -> tuple[KVSend, ...]:
        """Options of a layer for method budget: every choice of rows in every wire dtype."""
        rows = [KVSend(), *(cut_to(*choice) for choice in self.sparse_choices)]
        return tuple(row.model_copy(update={"wire_dtype": wire}) for row in rows for wire in self.wire_choices)

    @model_serializer(mode="wrap")
    def _taken(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump only the keys of the method, so that other methods' defaults may change without changing recipes."""
        takes = (*_TAKES[self.method], *_ALL_TAKE, "pool_dtype")
        absent = {name for name, value in _LATER.items() if getattr(self, name) == value}
        return {name: value for name, value in serialise(self).items() if name in takes and name not in absent}

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
            if self.reduction is not None and self.max_loss is not None:
                raise ValueError("method is 'budget'; allowed with it: either reduction or max_loss")
            if any(first + last == 0 for first, last, *_ in self.sparse_choices):
                raise ValueError("sparse_choices has a pair of zeros; allowed: n_first + n_last of at least 1")
            if any(share > MOST_SHARE for _, _, *shares in self.sparse_choices for share in shares):
                raise ValueError(
                    f"sparse_choices has a share of {SHARE_UNIT}ths above {MOST_SHARE}; allowed: at most {MOST_SHARE}"
                )
        if any(shorter >= longer for shorter, longer in pairwise(self.prompts)):
            raise ValueError(
                f"longer_prompts is {list(self.longer_prompts)}; allowed: lengths that ascend, each above prompt_tokens"
            )
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

    @model_validator(mode="after")
    def _prompts_to_halve(self) -> KVSection:
        if self.method == "simlayerkv" and self.prompt_tokens < LEAST_PROMPT:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens}; allowed with simlayerkv: at least {LEAST_PROMPT}, whose last "
                "half looks at the first"
            )
        if self.measures_offsets and self.sequences == 1 and self.prompt_tokens < LEAST_PROMPT:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens} and sequences is 1; allowed with key_offsets: at least "
                f"{LEAST_PROMPT}, half of which are held out, or more sequences"
            )
        return self

    def _most_kept(self) -> int:
        if self.method == "budget":
            return max((first + last for first, last, *_ in self.sparse_choices), default=0)
        return self.n_first + self.n_last


def cut_to(n_first: int, n_last: int, share: int = 0, *, wire_dtype: WireDtype = "native") -> KVSend:
    """The rule of a cut layer."""
    return KVSend(mode="sparse", n_first=n_first, n_last=n_last, share=share, wire_dtype=wire_dtype)
