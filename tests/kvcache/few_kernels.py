"""A few checks of the part of kernels, small, on the CPU in Triton's interpreter: for test_gpu.py, in a child."""

import torch

from pdtrim_deploy.gpucheck import kernel_bits, kernels

NAMES = ("Triton", "checksum", "bits, k4v3 from bfloat16", "bits, native from fp8_e5m2")


def checks():
    kernel_bits.HEAD_DIMS = kernel_bits.USUAL_HEAD_DIMS = (96,)
    listed = kernels.kernel_checks(torch.device("cpu"))
    return [check for check in listed if check.name.removeprefix("kernels: ") in NAMES]
