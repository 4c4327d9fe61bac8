"""Codes and scales, to and fro: blocks that do not divide a weight, zeros, powers of two, scales in bfloat16."""

import pytest
import torch

from pdtrim_deploy.models.quantized.arithmetic import LARGEST, dequantize, quantize

SHAPE, BLOCK = (70, 45), (32, 16)


def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, SHAPE[0])[:, None]


@pytest.mark.parametrize(
    ("like", "block"),
    [((), None), ((1,), None), ((1, 1), None), ((70,), None), ((70, 1), None), ((3, 3), BLOCK)],
)
@pytest.mark.parametrize("powers", [False, True])
def test_a_weight_comes_back_within_half_a_step(like, block, powers):
    values = weight()
    codes, scale = quantize(values, torch.empty(like), block, powers)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.float8_e4m3fn, SHAPE, torch.Size(like))
    error = (dequantize(codes, scale, block) - values).abs()
    step = 2.0**-9 * scale.max() if scale.numel() == 1 else None  # of e4m3's smallest numbers
    assert (error <= values.abs() / 16 + (step if step is not None else values.abs().max() * 2**-9)).all()
    assert codes.float().abs().max() == LARGEST or powers
    if powers:
        assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))


def test_a_block_has_its_own_scale_at_the_edges_too():
    values = torch.zeros(SHAPE)
    values[64:, 32:] = 448.0  # the last block: 6 x 13
    values[0, 0] = 44.8
    codes, scale = quantize(values, torch.empty(3, 3), BLOCK, False)
    assert scale[2, 2] == 1
    assert scale[0, 0] == pytest.approx(0.1)
    assert (scale.flatten()[1:8] == 1).all()
    assert torch.equal(dequantize(codes, scale, BLOCK), torch.where(values == 44.8, codes[0, 0].float() * 0.1, values))


def test_a_scale_that_bfloat16_rounds_down_leaves_no_nan():
    values = torch.full((2, 3), 448 * 1.00390)  # of 1.0039, bfloat16 makes 1
    codes, scale = quantize(values, torch.empty(2, 1, dtype=torch.bfloat16), None, False)
    assert scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(dequantize(codes, scale, None), torch.full((2, 3), 448.0))


def test_tiny_weights_leave_no_nan():
    codes, scale = quantize(torch.full((2, 3), 1e-40), torch.empty(()), None, False)
    assert dequantize(codes, scale, None).isfinite().all()
