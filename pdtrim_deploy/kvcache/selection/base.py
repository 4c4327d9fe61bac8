"""What a KV selection is asked: which decode layers shall get only the first and last prompt tokens' KV."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.oracle import PDOracle
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.wire import WireDtype

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """Choose `sparse_layers` of the decode layers.

    Attributes:
        oracle: the stage models, pruned already; its plan's KV rules are ignored.
        sequences: calibration text, int64 `[S, N + T]`, the first `prompt_tokens` = N of each are its prompt.
        n_first, n_last: prompt tokens whose KV a sparse layer gets.

    Raises:
        UserError: more sparse layers than decode has.

    """

    oracle: PDOracle
    sequences: Tensor
    prompt_tokens: int
    sparse_layers: int
    n_first: int
    n_last: int
    wire_dtype: WireDtype = "native"

    def __post_init__(self) -> None:
        if self.sparse_layers > self.layers:
            raise UserError(
                f"sparse_layers is {self.sparse_layers} but decode keeps {self.layers} layers; "
                f"choose at most {self.layers}"
            )

    @property
    def layers(self) -> int:
        """Layers of the decode model."""
        return len(self.oracle.plan.decode_layers)

    def sends(self, sparse: Collection[int]) -> tuple[KVSend, ...]:
        """One rule per decode layer, those in `sparse` cut."""
        full = KVSend(wire_dtype=self.wire_dtype)
        if not sparse:
            return (full,) * self.layers
        cut = KVSend(mode="sparse", n_first=self.n_first, n_last=self.n_last, wire_dtype=self.wire_dtype)
        return tuple(cut if layer in sparse else full for layer in range(self.layers))


class Selection(Protocol):
    """A method; equal requests give equal answers."""

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """One rule per decode layer, in their order."""
        ...
