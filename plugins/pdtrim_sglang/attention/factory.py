"""Our attention backends in the place of SGLang's own, where a plan cuts layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# By the name of `--attention-backend`, and what stands in their place once they are wanted.
ATTENTION = {"triton": "SparseTritonBackend", "flashinfer": "SparseFlashInferBackend"}


@dataclass(frozen=True)
class SparseFactory:
    """Makes our backend where SGLang's registry would make its own; imports neither before that."""

    name: str
    original: Callable[[Any], Any]

    def __call__(self, runner: Any) -> Any:
        """The backend of one model runner: SGLang's own where no layer of its plan is cut."""
        from pdtrim_sglang.attention.sparse_layers import sparse_windows

        if not sparse_windows(runner):
            return self.original(runner)
        module = importlib.import_module(f"pdtrim_sglang.attention.{self.name}")
        options = {"init_new_workspace": runner.init_new_workspace} if self.name == "flashinfer" else {}
        return getattr(module, ATTENTION[self.name])(runner, **options)


def replace_attention_backends() -> None:
    """Put a `SparseFactory` around each of SGLang's own factories that has one of ours."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name in ATTENTION:
        if not isinstance(ATTENTION_BACKENDS[name], SparseFactory):
            ATTENTION_BACKENDS[name] = SparseFactory(name, ATTENTION_BACKENDS[name])
