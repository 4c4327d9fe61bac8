"""Run by test_checksum.py under TRITON_INTERPRET=1: the kernel of the checksum against torch's operations."""

import pytest
import torch

from pdtrim_deploy.kvcache.checksum import torch_checksum
from pdtrim_deploy.kvcache.gpu.checksum import BLOCK, launched

SIZES = [0, 1, 7, 8, 9, 63, 8 * BLOCK - 1, 8 * BLOCK, 8 * BLOCK + 1, 3 * 8 * BLOCK + 5]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_it_is_torchs(size, fill):
    buffer = {
        "random": torch.randint(0, 256, (size + 16,), dtype=torch.uint8),
        "zeros": torch.zeros(size + 16, dtype=torch.uint8),
        "ones": torch.full((size + 16,), 255, dtype=torch.uint8),
    }[fill]
    assert torch.equal(launched(buffer[:size]), torch_checksum(buffer[:size]))
