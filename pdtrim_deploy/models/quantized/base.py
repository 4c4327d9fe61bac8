"""What a format of FP8 weights says of a checkpoint: where scales stand, and what one scale covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.tensors import TensorInfo

CODES = "F8_E4M3"
"""The dtype of codes, in safetensors' words: torch.float8_e4m3fn."""
SCALE_DTYPES = ("F32", "BF16", "F16")
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
INPUT_SCALE = "input_scale"


class UnsupportedScheme(Exception):
    """A format that is read, in a scheme that is not; its text says which: "quant_algo NVFP4"."""


def block_size(value: object, where: str) -> tuple[int, int]:
    """Rows and columns of a block of scales, of a setting; raises UnsupportedScheme where it is no pair of sizes."""
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise UnsupportedScheme(f"{where} {value!r}")


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """A setting that must have keys, empty where it is not given; raises UnsupportedScheme where it has none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedScheme(f"{where} {value!r}")
    return value


@dataclass(frozen=True)
class Quantized:
    """How the linear weights of a checkpoint are stored: codes of one byte, and scales that codes are multiplied by.

    Attributes:
        method: the format's name in `quantization_config`.
        scale: last part of the name of a weight's scales, which stand beside it.
        section: the format's own keys, as config.json or hf_quant_config.json has them.
        block: rows and columns of a weight that share a scale; None: a row or the whole weight does.
        powers_of_two: whether scales are.
        inputs: what a layer's input is rounded to FP8 under: a scale for each token, for each group of as many values
            as a block has columns, or one that is stored; None: it is not rounded.

    """

    method: str
    scale: str
    section: Mapping[str, Any]
    block: tuple[int, int] | None = None
    powers_of_two: bool = False
    inputs: Literal["token", "group", "stored"] | None = None

    @property
    def label(self) -> str:
        """As reports name it."""
        each = f"one scale for each {self.block[0]} x {self.block[1]} block" if self.block else "one scale or one a row"
        return f"FP8 in {self.method} format ({each})"

    def scale_of(self, weight: str) -> str:
        """The name of the scales of `weight`, `....weight`."""
        return f"{weight.removesuffix('weight')}{self.scale}"

    def is_quantized(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensor is codes with scales."""
        return name.endswith(".weight") and tensors[name].dtype == CODES

    def is_scale(self, name: str) -> bool:
        """Whether the tensor is scales, of weights or of what goes into them, and no weight of its own."""
        return name.rpartition(".")[2] in (self.scale, INPUT_SCALE)

    def stays(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensor is never cast: codes, and all scales."""
        return self.is_scale(name) or self.is_quantized(name, tensors)

    def check(self, tensors: Mapping[str, TensorInfo], where: str) -> None:
        """Refuse, with UserError: codes without scales, scales of another shape, dtype or of no codes, and no codes."""
        if not any(self.is_quantized(name, tensors) for name in tensors):
            raise UserError(
                f"{where}: quantization_config says {self.method}, but no weight is {CODES}; delete that key, or get "
                "the model again"
            )
        for name, info in tensors.items():
            if self.is_quantized(name, tensors):
                scale = tensors.get(self.scale_of(name))
                if scale is None:
                    raise UserError(f"{where}: {name} is {CODES} without {self.scale_of(name)}; get the model again")
                if scale.dtype not in SCALE_DTYPES:
                    allowed = ", ".join(SCALE_DTYPES)
                    raise UserError(f"{where}: {self.scale_of(name)} is {scale.dtype}; allowed: {allowed}")
                if not self._covers(scale.shape, info.shape):
                    raise UserError(
                        f"{where}: {self.scale_of(name)} is {list(scale.shape)}, which are no scales of a weight "
                        f"{list(info.shape)} in {self.method} format; get the model again"
                    )
            elif name.endswith(f".{self.scale}"):
                weight = f"{name.removesuffix(self.scale)}weight"
                if weight not in tensors or not self.is_quantized(weight, tensors):
                    raise UserError(f"{where}: {name} is there, but {weight} is not {CODES}; get the model again")

    def _covers(self, scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
        if len(weight) != 2:
            return False
        if self.block is not None:
            return scale == tuple(-(-size // side) for size, side in zip(weight, self.block, strict=True))
        return scale in ((), (1,), (1, 1), weight[:1], (weight[0], 1))


class Format(Protocol):
    """One format, by the name that `quant_method` has."""

    method: str

    def read(self, section: Mapping[str, Any]) -> Quantized:
        """What its keys say; raises UnsupportedScheme where they say more than FP8 weights."""
        ...


def is_kv_scale(name: str) -> bool:
    """Whether the tensor scales rows of an fp8 KV pool: stages have none, their pools are the plan's."""
    return name.endswith(_KV_SCALES)
