"""DP attention on a CPU: SGLang 0.5.23's attention backend torch_native lacks an answer that the one for AMX has.

Ranks that divide requests among each other compute their MLPs together, so each pads its batch of decode to the largest
one's. The backend says which length a request has that is no request.
"""

from __future__ import annotations

LENGTH = 1  # as SGLang's for AMX says: the padding reads one row, and nobody reads what it computes


def pad_batches_of_torch_native() -> None:
    """From now on this process's torch_native backends say it; those of an SGLang that has the answer do already."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if not hasattr(TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"):
        TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda _: LENGTH
