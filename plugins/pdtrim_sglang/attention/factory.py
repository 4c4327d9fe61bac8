"""A `KeptBackend` in the place of SGLang's attention backend, where a plan cuts layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Names of `--attention-backend` whose decode reads all it must know of a batch from `req_to_token` and lengths.
ATTENTION = ("torch_native", "triton", "flashinfer", "fa3", "trtllm_mha")


@dataclass(frozen=True)
class KeptFactory:
    """Makes our backend where SGLang's registry would make its own; imports neither before that."""

    name: str
    original: Callable[[Any], Any]

    def __call__(self, runner: Any) -> Any:
        """The backend of one model runner: SGLang's own where no layer is cut, and for prefill where that differs."""
        from pdtrim_sglang.kept_pool.pool import KeptKVPool

        if not isinstance(runner.token_to_kv_pool, KeptKVPool) or runner.decode_attention_backend_str != self.name:
            return self.original(runner)
        from pdtrim_sglang.attention.kept_backend import KeptBackend

        return KeptBackend(runner, self.original)


@dataclass(frozen=True)
class TorchFactory:
    """Of torch_native: on a CPU with sinks and SGLang's pool of windows, `original` on other devices."""

    original: Callable[[Any], Any]

    def __call__(self, runner: Any) -> Any:
        if runner.device != "cpu":
            return self.original(runner)
        from pdtrim_sglang.cpu.torch_attention import TorchAttention

        return TorchAttention(runner)


def replace_attention_backends() -> None:
    """Put a `KeptFactory` around each of SGLang's own factories that it knows."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name in ATTENTION:
        if not isinstance(original := ATTENTION_BACKENDS[name], KeptFactory):
            make = TorchFactory(original) if name == "torch_native" else original
            ATTENTION_BACKENDS[name] = KeptFactory(name, make)
