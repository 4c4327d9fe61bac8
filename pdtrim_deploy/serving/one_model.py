"""Which options a bundle of one model for both stages takes: it has no KV transfer, no engines, one kind of worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.engines import Executors
from pdtrim_deploy.serving.spec import WorkerOptions
from pdtrim_deploy.serving.transports import Transport


def require_kind(
    bundle: Bundle,
    workers: int,
    stages: tuple[int, int],
    options: WorkerOptions,
    executors: Executors,
    transport: Mapping[str, Any],
) -> None:
    """UserError: options of a pair for a bundle of one model, or the other way round.

    `workers` do both stages, `stages` are the workers of prefill and of decode; 1 is what nobody asked for.
    """
    if not bundle.plan.unified:
        if workers != 1:
            raise UserError(f"--workers {workers}: {bundle.path} is a pair; say --prefill and --decode instead")
        return
    refused = {
        "--prefill and --decode (say --workers)": stages != (1, 1),
        "executors": executors != Executors(),
        "--transport": options.transfer_backend != Transport().backend or bool(transport),
        "--send-by-layer": options.send_by_layer,
        "--split-decode-pool": options.split_pool is not None,
        "--prefill-args and --decode-args (say --worker-args)": bool(options.prefill_args or options.decode_args),
    }
    if wrong := [name for name, used in refused.items() if used]:
        raise UserError(
            f"{bundle.path} is one model for both stages, whose workers hand over no KV: leave out {', '.join(wrong)}"
        )
    if options.tp_prefill != options.tp_decode:
        raise UserError(
            f"--tp-prefill {options.tp_prefill} --tp-decode {options.tp_decode}: {bundle.path} is one model for both "
            "stages, whose workers take as many GPUs for both; give the same number"
        )
