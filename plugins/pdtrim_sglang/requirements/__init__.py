"""What SGLang's options, its loaded model and its pool must be so that sparse transfer is right."""

from pdtrim_sglang.requirements.decode import attention_backend
from pdtrim_sglang.requirements.dp_attention import check_dp_attention
from pdtrim_sglang.requirements.layer_events import layers_unheard
from pdtrim_sglang.requirements.options import check_lora, check_options
from pdtrim_sglang.requirements.sizes import check_draft_ranks, check_staging
from pdtrim_sglang.requirements.states import check_state_pool, check_states_served
from pdtrim_sglang.requirements.windows import check_window, check_windows, loaded_windows

__all__ = [
    "attention_backend",
    "check_dp_attention",
    "check_draft_ranks",
    "check_lora",
    "check_options",
    "check_staging",
    "check_state_pool",
    "check_states_served",
    "check_window",
    "check_windows",
    "layers_unheard",
    "loaded_windows",
]
