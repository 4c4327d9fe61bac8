"""All checks, in the order in which they are shown."""

from __future__ import annotations

from pdtrim_deploy.doctor.base import Check
from pdtrim_deploy.doctor.packages import Package, PythonVersion
from pdtrim_deploy.doctor.programs import Aiperf, Gpu, Program
from pdtrim_deploy.doctor.resources import Disk, Memory
from pdtrim_deploy.doctor.serving import SGLang

CHECKS: tuple[Check, ...] = (
    PythonVersion(),
    Gpu(),
    Memory(),
    Disk(),
    *(Package(name, "build") for name in ("torch", "transformers", "safetensors")),
    Package("httpx", "build", ("build", "demo")),
    Package("prometheus-client", "build", ("demo",)),
    Package("gguf", "build", why="sources gguf: and pypi:"),
    *(Package(name, "build", why="target onnx") for name in ("onnx", "onnxruntime", "onnxruntime-extensions")),
    Package("nvidia-modelopt", "build", why="target tensorrt-llm, quantised"),
    Package("tensorrt-rtx", "tensorrt-rtx", why="target tensorrt-rtx"),
    Package("ray", "ray", ("build",), "build --workers"),
    SGLang(),
    Program("g++", "packs KV on the CPU in one pass; torch's operations otherwise", "apt-get install g++"),
    Program("nvcc", "make plugin: the CUDA kernel", "install NVIDIA's CUDA toolkit, 13.0 or later"),
    Aiperf(),
)
