"""Tensors whose bytes lie in a file and are mapped: the system takes their pages back when memory is short."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor


def mapped(tensor: Tensor, folder: Path | None) -> Tensor:
    """`tensor` on the host, in a file of `folder`, by default the system's temporary one.

    The file loses its name as soon as it is mapped, so it goes with the process; and nothing holds it open, for there
    may be more such tensors than a process may have open files.

    Raises:
        OSError: a full disk, which shows here and not when a page is touched.

    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        flat = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape)
