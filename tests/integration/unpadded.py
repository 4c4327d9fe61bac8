"""For workers with more ranks than KV heads: neighbouring ranks hold copies of one head, as on a GPU.

On a CPU SGLang 0.5.23 gives the model more heads instead, of zeros (`configs/update_config.py`), and the plugin refuses
those. Called in the worker's process before SGLang starts. Nothing but the padding is left out: SGLang's
QKVParallelLinear divides and copies the heads.
"""

from __future__ import annotations


def leave_padding_out() -> None:
    """From now on models keep their heads in this process, and in those that it forks."""
    from sglang.srt.model_executor import model_runner

    model_runner.adjust_config_with_unaligned_cpu_tp = lambda config, *_: config
