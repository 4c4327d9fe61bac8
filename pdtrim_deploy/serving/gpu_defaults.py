"""What GPU workers are given of a plan, or where nobody chose: the same for `serve` and for rendered manifests."""

from __future__ import annotations

from pdtrim_deploy.plan.linear_states import StateDtype
from pdtrim_deploy.plan.wire import PoolDtype

# One for both stages, since pages that differ end the decode worker at its first request. SGLang's choice for prefill
# on sm_100, trtllm_mha, takes 16, 32, 64 or 128 tokens and makes 64 of others; fa3, Triton and FlashInfer take all.
PAGE_TOKENS = 64
# The attention that knows layers whose rows are cut, under CUDA graphs, and takes float32. Not run on a GPU yet.
GENERAL_BACKEND = "triton"
NO_WINDOW_POOL, WINDOW_POOL_SHARE = "--disable-hybrid-swa-memory", "--swa-full-tokens-ratio"


def attention_arguments(stage: str, sparse: bool, dtype: str) -> dict[str, object]:
    """Prefill has all rows of every layer, so SGLang chooses its attention, as it does where a plan cuts no layer.

    Not in float32: SGLang 0.5.23 would choose fa3, trtllm_mha or FlashInfer, whose kernels take 16 bits and fewer.
    """
    return {"--attention-backend": GENERAL_BACKEND} if dtype == "float32" or (sparse and stage == "decode") else {}


def graph_arguments(stage: str, tail: bool) -> dict[str, object]:
    """The layers that run the tails of prompts alone have as many rows as a batch has: no CUDA graph knows them."""
    return {"--cuda-graph-backend-prefill": "disabled"} if tail and stage == "prefill" else {}


def window_flags(stage: str, sparse: bool) -> list[str]:
    """Cut layers have no slots beside SGLang's pool of windows: decode does without it."""
    return [NO_WINDOW_POOL] if sparse and stage == "decode" else []


def precision_environment(dtype: str, conv_dtype: StateDtype | None) -> dict[str, str]:
    """So that Triton multiplies float32 in float32 and not in TF32, which has the mantissa of float16.

    Of a model with states, which have a `conv_dtype`, see `state_environment`.
    """
    precise = {"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {}
    return precise | state_environment(conv_dtype)


def state_environment(conv_dtype: StateDtype | None) -> dict[str, str]:
    """The convolution's columns of linear attention in the plan's dtype; SGLang's own choice is bfloat16."""
    return {} if conv_dtype is None or conv_dtype == "bfloat16" else {"SGLANG_MAMBA_CONV_DTYPE": conv_dtype}


def pool_arguments(pool_dtype: PoolDtype) -> dict[str, object]:
    """Both stages have the plan's KV pool. A native one is SGLang's own choice, and needs no option."""
    return {} if pool_dtype == "native" else {"--kv-cache-dtype": pool_dtype}
