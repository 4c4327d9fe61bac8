"""What the plugin asks of the SGLang process that it runs in. Imports nothing but sglang."""

from __future__ import annotations

import os
import signal
from typing import Any

READ_AGAINST = "0.5.23"


def end_worker() -> None:
    """Called in a scheduler's process: as SGLang ends a worker whose scheduler has failed, all processes of it."""
    os.kill(os.getppid(), signal.SIGQUIT)


def server_arguments() -> Any:
    """What this process of a worker was started with."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def own_address() -> str:
    """Where SGLang believes that other machines reach this one."""
    from sglang.srt.utils.network import get_local_ip_auto

    address: str = get_local_ip_auto()
    return address


def ib_devices(kv_args: Any) -> str:
    """The InfiniBand devices that `--disaggregation-ib-device` gives this rank's GPU, comma-separated; or nothing."""
    if not getattr(kv_args, "ib_device", None):
        return ""
    from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import get_ib_devices_for_gpu

    return get_ib_devices_for_gpu(kv_args.ib_device, kv_args.gpu_id) or ""


def ask_by(requests: Any) -> None:
    """From now on SGLang's KV managers, senders and receivers ask over HTTP with this in place of module `requests`."""
    from sglang.srt.disaggregation.common import conn

    conn.requests = requests
