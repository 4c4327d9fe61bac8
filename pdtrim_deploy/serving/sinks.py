"""Attention with sinks on a CPU, asked before a worker starts: SGLang 0.5.23 must take torch_native for it."""

from __future__ import annotations

import subprocess

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.processor import cpu_features
from pdtrim_deploy.serving.environment import ServeEnvironment

# Half of SGLang's `cpu_has_amx_support` (utils/common.py): a build of sgl_kernel for CPUs, and no stand-in of its name.
_KERNELS = "import sys, torch, sgl_kernel; sys.exit(not hasattr(torch.ops.sgl_kernel, 'convert_weight_packed'))"


def require_torch_attention(
    environment: ServeEnvironment, architecture: str, features: frozenset[str] | None = None
) -> None:
    """UserError where SGLang would take intel_amx for a model with sinks, which the plugin's attention is not in.

    `features` are the CPU's, as in /proc/cpuinfo; those of this machine when left out.
    """
    if "amx_tile" not in ((cpu_features() if features is None else features) or ()):
        return
    if subprocess.run([environment.python, "-c", _KERNELS], check=False, capture_output=True).returncode == 0:
        raise UserError(
            f"{architecture} has attention sinks, for which SGLang 0.5.23 takes intel_amx on a CPU with AMX, and the "
            "plugin's attention is torch_native; serve this bundle on GPUs, or name a --serve-python without sgl_kernel"
        )
