"""Names of a stage graph's inputs and outputs that carry KV, shared by who builds engines and who runs them."""

from __future__ import annotations

from pdtrim_deploy.plan.kv import KVSend


def rows_input(send: KVSend) -> str:
    """Graph input that lists a rule's rows, int64 `[R]`; layers with the same rule share it."""
    if send.mode == "full":
        return "send_rows_full"
    return f"send_rows_{send.n_first}_{send.n_last}{f'_{send.share}' if send.share else ''}"


def packed_output(decode_layer: int) -> str:
    """Graph output with a layer's packed rows, `[2, R, kv_heads * head_dim]`; K, then V."""
    return f"kv_send_{decode_layer}"
