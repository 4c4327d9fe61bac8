"""Stands in for SGLang's CUDA kernels on a machine without CUDA; nothing here computes.

No CPU build of `sgl_kernel` is published. SGLang 0.5.23 imports names from it at module level, yet a dense
Llama-family model on the `torch_native` backend calls none of them. `tools/environment.py` puts this folder
on the serve environment's path only where there is no GPU.
"""

from typing import Any, NoReturn

__version__ = "0.0.0+cpu.stub"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def stub(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"sgl_kernel.{name} was called, but this is the project's CPU stub of sgl_kernel, which computes "
            "nothing: serve a dense Llama-family model with --attention-backend torch_native, or use a GPU"
        )

    stub.__name__ = name
    return stub
