"""DeepSeek's attention (MLA) on a CPU without AMX, where SGLang 0.5.23 falls back to torch_native.

SGLang's model makes K and V of heads for a prompt without a cached prefix, and gives them to attention beside the pool;
torch_native reads the pool alone, which has latents. So that model is told to read latents always, as it does behind a
cached prefix and in decode: the same numbers, in another order of sums.
"""

from __future__ import annotations

from typing import Any

BACKEND = "torch_native"


def read_latents_on_torch_native(runner: Any) -> None:
    """For the model that SGLang's ModelRunner has just loaded, where it has latents."""
    if not getattr(runner, "use_mla_backend", False):
        return
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register(BACKEND, lambda attention, batch: AttnForwardMethod.MLA)
