"""All checks, in the order in which they are shown."""

from __future__ import annotations

from pdtrim_deploy.doctor.base import Check
from pdtrim_deploy.doctor.packages import Package, PythonVersion
from pdtrim_deploy.doctor.places import Writable
from pdtrim_deploy.doctor.programs import Aiperf, Device, Gpu, Program
from pdtrim_deploy.doctor.resources import Disk, Memory
from pdtrim_deploy.doctor.serving import SGLang
from pdtrim_deploy.doctor.steps import Steps
from pdtrim_deploy.doctor.weights import Weights
from pdtrim_deploy.recipe import Recipe


def _converts(recipe: Recipe) -> bool:
    return recipe.model.source.startswith(("gguf:", "pypi:"))


def _trains_lora(recipe: Recipe) -> bool:
    return recipe.healing.method == "lora" and recipe.healing.gradient_steps > 0


CHECKS: tuple[Check, ...] = (
    PythonVersion(),
    Gpu(),
    Device(),
    Memory(),
    Disk(),
    Steps(),
    Weights(),
    Writable("--out", lambda context: context.out, ("build", "demo")),
    Writable("--cache-dir", lambda context: context.cache.root, ("build", "eval", "demo")),
    *(Package(name, "build") for name in ("torch", "transformers", "safetensors")),
    Package("httpx", "build", ("build", "demo")),
    Package("prometheus-client", "build", ("demo",)),
    Package("gguf", "build", why="sources gguf: and pypi:", wanted_by=_converts),
    *(Package(name, "build", why="target onnx") for name in ("onnx", "onnxruntime", "onnxruntime-extensions")),
    Package("peft", "build", why="healing by LoRA", wanted_by=_trains_lora),
    Package("nvidia-modelopt", "build", why="target tensorrt-llm, quantised"),
    Package("tensorrt-rtx", "tensorrt-rtx", why="target tensorrt-rtx"),
    Package("ray", "ray", ("build",), "build --workers"),
    SGLang(),
    Program("g++", "packs KV on the CPU in one pass; torch's operations otherwise", "apt-get install g++"),
    Program(
        "npm",
        "fetches corpus brown, part of the text of a recipe that names none",
        "apt-get install npm, or name your own text in calibration.corpus and evaluation.corpus",
        jobs=("build", "eval", "demo"),
    ),
    Program("nvcc", "make plugin: the CUDA kernel", "install NVIDIA's CUDA toolkit, 13.0 or later"),
    Aiperf(),
)
