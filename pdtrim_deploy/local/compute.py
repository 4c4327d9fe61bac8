"""Where models run and in what dtype: checked once, where a command begins, and handed on as an object."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.processor import compute_dtype

_CUDA = re.compile(r"cuda(:\d{1,3}(,\d{1,3})*)?")
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # NVIDIA's on Linux, and within Windows; without, no torch
CHOICES = "auto, cpu, cuda, cuda:0 or cuda:0,1"
MEND = "give --device auto or cpu, or install a torch that is built for CUDA"


@dataclass(frozen=True)
class Compute:
    """Devices and dtype of what a command computes.

    Token ids, losses and whatever is written to files are on the host, whatever the devices; weights, hidden states,
    KV, Gram matrices and logits are on the devices. Random numbers are drawn on the host, so that devices differ by
    the order of sums alone.

    Attributes:
        devices: "cpu", or GPUs such as "cuda:0". Blocks are spread over them in order, as evenly as can be; the first
            has the embedding, the final norm and the LM head too.
        dtype: of weights and arithmetic: "float32", "bfloat16" or "float16"; that of the KV pool is the recipe's.
        blocks_in_memory: blocks of a model whose weights are there at a time, where they need not all be; others are
            read from the checkpoint when they run, to the same bits. None: all.
        state_bytes: of hidden states or prompt KV that are kept, or go through a block side by side, to save work, at
            most; None: what each step takes by itself.
        host_bytes, device_bytes: what `--memory` and `--device-memory` allow on the host, and on all GPUs together;
            commands choose the two limits above by them.

    """

    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "float32"
    blocks_in_memory: int | None = None
    state_bytes: int | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None

    @classmethod
    def parse(cls, devices: str, *, absent: bool = False) -> Compute:
        """What `--device` names, in float32.

        "auto" is the first GPU that torch sees, else the CPU; "cuda" is the first GPU.

        Raises:
            UserError: it names no device, one twice, or one that is not here, unless such may be `absent`.

        """
        if devices == "cpu":
            return cls()
        if devices != "auto" and not _CUDA.fullmatch(devices):
            raise UserError(f"--device {devices}: no such device; use {CHOICES}")
        if devices == "auto":
            return cls(("cuda:0",) if any(map(Path.exists, _DRIVERS)) and _cuda_devices() else ("cpu",))
        numbers = [int(number) for number in devices.partition(":")[2].split(",") if number] or [0]
        if len(set(numbers)) < len(numbers):
            raise UserError(f"--device {devices}: a GPU is named twice; name each once")
        compute = cls(tuple(f"cuda:{number}" for number in numbers))
        if not absent and (lack := compute.lack):
            raise UserError(f"--device {devices}: {lack}; {MEND}")
        return compute

    @property
    def lack(self) -> str | None:
        """Which GPU is not here, as part of a sentence; None where all devices are."""
        if not self.on_gpu:
            return None
        count = _cuda_devices()
        absent = [device for device in self.devices if int(device.partition(":")[2]) >= count]
        has = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 alone" if count else "no GPU"
        return f"torch sees {has} here, not GPU {absent[0].partition(':')[2]}" if absent else None

    @property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.devices[0] != "cpu"

    def within(self, host_bytes: int | None, device_bytes: int | None) -> Compute:
        """The same devices, and so much memory at most; UserError: memory of GPUs is limited where none is used."""
        if device_bytes is not None and not self.on_gpu:
            raise UserError("--device-memory limits GPUs, but the model runs on the CPU; give --memory, or a --device")
        return replace(self, host_bytes=host_bytes, device_bytes=device_bytes)

    def with_dtype(self, dtype: str) -> Compute:
        """The same devices, another dtype."""
        return replace(self, dtype=dtype)

    def with_blocks(self, blocks_in_memory: int | None) -> Compute:
        """The same devices, other blocks in memory at a time; None: all."""
        return replace(self, blocks_in_memory=blocks_in_memory)

    def with_states(self, state_bytes: int) -> Compute:
        """The same with fewer hidden states and prompt KV."""
        return replace(self, state_bytes=state_bytes)

    def states(self, usual: int) -> int:
        """Bytes of states for a step that takes `usual` by itself."""
        return usual if self.state_bytes is None else min(usual, self.state_bytes)

    def streams(self, blocks: int) -> bool:
        """Whether a model of so many blocks is read block by block."""
        return self.blocks_in_memory is not None and self.blocks_in_memory < blocks

    def fast(self, dtype: str) -> Compute:
        """The same devices, and `dtype`, or float32 for a bfloat16 that this CPU only emulates."""
        return self.with_dtype(dtype if self.on_gpu else compute_dtype(dtype))

    def device_of(self, block: int, blocks: int) -> str:
        """The device of one of a model's blocks."""
        return self.devices[block * len(self.devices) // blocks]

    @property
    def names(self) -> str:
        """The devices as `--device` has them: `cuda:0,1`."""
        return self.devices[0] + "".join("," + device.partition(":")[2] for device in self.devices[1:])


ON_CPU = Compute()


def _cuda_devices() -> int:
    """GPUs that torch sees; 0 without torch, whose absence other checks report."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
