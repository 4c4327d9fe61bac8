"""Linear attention is refused where SGLang has no kernel for it."""

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import LinearStates, ModelShape
from pdtrim_deploy.serving.linear_attention import require_linear_attention

STATES = LinearStates(blocks=(0,), key_heads=4, key_dim=8, value_heads=8, value_dim=8, conv_columns=3)
USUAL = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=2, head_dim=8, kv_dtype="float32")
HYBRID = USUAL.model_copy(update={"states": STATES})


def test_float32_is_refused_on_a_gpu_and_every_dtype_on_a_cpu():
    with pytest.raises(UserError, match=r"not compute in float32 on a GPU: build with model.dtype bfloat16 or float16"):
        require_linear_attention(HYBRID, "float32")
    for dtype in ("bfloat16", "float16"):
        require_linear_attention(HYBRID, dtype)
        with pytest.raises(UserError, match=r"X has linear attention, .*serve this bundle on GPUs"):
            require_linear_attention(HYBRID, dtype, "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_models_are_not_refused(device):
    require_linear_attention(USUAL, "float32", device)
