"""Compile the kernels: nvcc for GPUs (`make plugin`, which fails on any register spill), g++ for the host.

As a command: `python -m pdtrim_tensorrt.compile_kernels out/plugin`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_tensorrt.kernel import KERNELS

ARCHITECTURES = (80, 90, 100, 120)
SOURCE = KERNELS / "sparse_kv_send.cu"
_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_DTYPES, _WIRES = ("float32", "float16", "bfloat16"), ("native", "int8", "fp8")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture; bytes per thread."""

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def parse_ptxas(log: str) -> list[Usage]:
    """Every kernel in the output of `-Xptxas -v`.

    Raises:
        ValueError: a kernel without figures; the format is not the one of nvcc 13.0.

    """
    usages = []
    entries = list(_ENTRY.finditer(log))
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        text = log[entry.end() : following.start() if following else len(log)]
        spills, registers = _SPILLS.search(text), _REGISTERS.search(text)
        if not spills or not registers:
            raise ValueError(f"ptxas printed no registers or spills of {entry[1]}")
        usages.append(Usage(_readable(entry[1]), int(entry[2]), int(registers[1]), *map(int, spills.groups())))
    return usages


def compile_for_gpus(folder: Path) -> tuple[Path, list[Usage]]:
    """A shared library with one cubin for each of ARCHITECTURES, and what ptxas said.

    Raises:
        UserError: nvcc is missing or refused the source.

    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise UserError("make plugin: nvcc is not on PATH; install the CUDA toolkit (13.0 is what was tried)")
    library = folder / "libpdtrim_kernels.so"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]  # --threads: its device link lost a file once
    shown = ["-Xptxas", "-v", "-Werror", "all-warnings"]
    return library, parse_ptxas(_run([nvcc, *options, *shown, *targets, "-o", str(library), str(SOURCE)], folder))


def compile_for_host(folder: Path) -> Path:
    """The same source as a shared library that runs on the CPU, for tests.

    Raises:
        UserError: g++ is missing or refused the source.

    """
    gxx = shutil.which("g++")
    if gxx is None:
        raise UserError("compiling the kernel for the host needs g++")
    library = folder / "libpdtrim_kernels_host.so"
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    exact = ["-fno-strict-aliasing", "-ffp-contract=off"]  # as a GPU: vectors alias scalars, no fused multiply-add
    _run([gxx, *options, *exact, "-x", "c++", str(SOURCE), "-o", str(library)], folder)
    return library


def _run(command: list[str], folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} refused {SOURCE.name}:\n{done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def _readable(mangled: str) -> str:
    """`copy_rows 2 bytes`, `quantise_rows float16 int8` from an Itanium mangled name."""
    if copy := re.search(r"copy_rowsI([jt])E", mangled):
        return f"copy_rows {4 if copy[1] == 'j' else 2} bytes"
    if quantise := re.search(r"quantise_rowsILi(\d)ELi(\d)E", mangled):
        return f"quantise_rows {_DTYPES[int(quantise[1])]} {_WIRES[int(quantise[2])]}"
    return mangled


def main(folder: Path) -> int:
    """Compile and print; 1 when a kernel spills, 2 when it cannot be compiled."""
    try:
        library, usages = compile_for_gpus(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    kernels = sorted({usage.kernel for usage in usages})
    by_cell = {(usage.kernel, usage.architecture): usage for usage in usages}
    print(f"{'registers (+ spilled bytes)':36}" + "".join(f"{f'sm_{sm}':>10}" for sm in ARCHITECTURES))
    for kernel in kernels:
        cells = (by_cell[kernel, sm] for sm in ARCHITECTURES)
        spilled = ((c.registers, c.spill_store_bytes + c.spill_load_bytes) for c in cells)
        print(f"{kernel:36}" + "".join(f"{f'{r} + {s}' if s else r:>10}" for r, s in spilled))
    worst = max(usage.spill_store_bytes + usage.spill_load_bytes for usage in usages)
    verdict = "a kernel spills: FAILED" if worst else "no spill"
    print(f"{len(kernels)} kernels, {len(ARCHITECTURES)} architectures: {verdict}; {library}")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
