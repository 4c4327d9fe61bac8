"""DP attention: groups of ranks divide requests among each other, and ranks of a group the heads of their requests.

SGLang 0.5.23 takes --attn-dp-size (once --enable-dp-attention) with any model. But attention of some (models/llama.py,
qwen2.py, glm4.py, mixtral.py, gemma3_causal.py, granite.py, olmo2.py) divides heads among all ranks of tensor
parallelism and sums over them, as if they had the same requests: text is wrong, and a rank that has none ends. So do
models that SGLang runs through transformers (models/transformers.py), whose attentions are in a dict and no part of the
module. A draft model (EAGLE's is a Llama) has the target's groups as well, unless SGLang gives it ranks of its own, as
it does for EAGLE3 (speculative/draft_parallel.py).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel


def check_dp_attention(runner: Any) -> None:
    """Of SGLang's ModelRunner, whose model has just been loaded.

    Raises:
        RuntimeError: its attention does not know groups, in one sentence.

    """
    parallel = get_parallel()
    if parallel.attn_dp_size == 1:
        return
    heads = runner.model_config.num_attention_heads // parallel.attn_tp_size
    attentions = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    if not attentions or any(attention.tp_q_head_num != heads for attention in attentions):
        wrong, leave = ("drafts", ", or without --speculative-algorithm") if runner.is_draft_worker else ("text", "")
        raise RuntimeError(
            f"pdtrim: attention of SGLang 0.5.23's {type(runner.model).__name__} sums over ranks that have other "
            f"requests, so {wrong} would be wrong with DP attention: start without --attn-dp-size or "
            f"--enable-dp-attention{leave}"
        )
