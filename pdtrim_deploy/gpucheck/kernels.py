"""Pack and unpack on a GPU: their bytes, their share of a copy's bandwidth, their launches.

`kernel_checks()` is the whole part. It needs torch and triton alone, and no network. By itself:

    python -m pdtrim_deploy.gpucheck.kernels
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import torch

from pdtrim_deploy.gpucheck.checks import Check, Figure, rows_of
from pdtrim_deploy.gpucheck.kernel_bits import bits, checksums, latent_bits
from pdtrim_deploy.gpucheck.kernel_speed import bandwidth, launches
from pdtrim_deploy.plan.wire import FP8_ROWS, LATENT_SIDES, SMALLER_THAN_FP8, WIRE_DTYPES

DTYPES = ("bfloat16", "float16", "float32")


def kernel_checks(device: torch.device | None = None) -> list[Check]:
    """Bandwidth and launches of each wire dtype, the checksum, then bits of each wire and pool dtype.

    Bits come last, since they compile most: a kernel for each head size, pool dtype, wire dtype and direction.
    """
    if device is None:
        if not torch.cuda.is_available():
            return [Check("kernels", skip="torch sees no CUDA device")]
        device = torch.device("cuda", torch.cuda.current_device())
    if find_spec("triton") is None:
        return [Check("kernels", skip="Triton is not installed: pip install triton")]
    checks = [Check("kernels: Triton", triton_runs, 3)]
    for wire in WIRE_DTYPES:
        checks.append(Check(f"kernels: bandwidth, {wire}", partial(bandwidth, device, wire), 5))
        checks.append(Check(f"kernels: launches, {wire}", partial(launches, device, wire), 5))
    checks.append(Check("kernels: checksum", partial(checksums, device), 3))
    for wire in WIRE_DTYPES:
        for dtype in (*DTYPES, *(FP8_ROWS if wire in SMALLER_THAN_FP8 else ())):
            seconds = 15 if dtype == "bfloat16" else 5
            checks.append(Check(f"kernels: bits, {wire} from {dtype}", partial(bits, device, wire, dtype), seconds))
    for latent in LATENT_SIDES:
        checks.append(Check(f"kernels: bits, latents in {latent}", partial(latent_bits, device, latent), 5))
    return checks


def triton_runs() -> Figure:
    """Whether Triton can compile for this device; raises what it raises. Workers would pack by torch's operations."""
    import triton

    if not hasattr(triton, "knobs"):
        raise AssertionError(f"Triton {triton.__version__} is too old: it needs 3.4 or later")
    if triton.knobs.runtime.interpret:
        return {"target": "the interpreter"}
    target = triton.runtime.driver.active.get_current_target()
    return {"target": f"{target.backend} {target.arch}"}


def main() -> None:
    """Print the rows."""
    for row in rows_of(kernel_checks()):
        print(asdict(row), flush=True)


if __name__ == "__main__":
    main()
