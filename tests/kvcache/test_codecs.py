"""The table of wire dtypes, and what each codec's docstring says of its bytes."""

import pytest
import torch

from pdtrim_deploy.kvcache.codecs import CODECS, get_codec
from pdtrim_deploy.kvcache.codecs.int4 import float16_below, hadamard
from pdtrim_deploy.wire import ITEM_BYTES, WIRE_DTYPES, packed_row_bytes, row_sections


def encode(wire, rows):
    """Rows `[n, heads, dim]` as sections."""
    sections = [
        torch.zeros(*rows.shape[:2], kind.per_head, dtype=getattr(torch, kind.dtype))
        for kind in row_sections(wire, str(rows.dtype).removeprefix("torch."), rows.shape[-1])
    ]
    get_codec(wire).encode(rows, slice(0, len(rows)), sections)
    return sections


def test_every_wire_dtype_has_a_codec():
    assert tuple(CODECS) == WIRE_DTYPES
    with pytest.raises(KeyError, match="unknown wire dtype 'int2'; use one of native, fp8, int8, int4"):
        get_codec("int2")


def test_item_bytes_are_torchs():
    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES


@pytest.mark.parametrize("head_dim", [4, 8, 64, 80, 96, 112, 128, 256])
def test_int4_bytes_of_real_head_sizes(head_dim):
    group = {4: 4, 8: 8, 80: 16, 112: 16}.get(head_dim, 32)
    assert packed_row_bytes("int4", "bfloat16", 3, head_dim) == 3 * (head_dim // 2 + 4 * head_dim // group)


def test_int8_codes_and_scale():
    rows = torch.tensor([[[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]])
    codes, scale = encode("int8", rows)
    assert codes.tolist() == [[[127, -64, 0, 2], [0, 0, 0, 0]]]  # half to even
    assert scale.tolist() == [[[1.0], [0.0]]]


def test_fp8_decodes_every_code_as_torch_does():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(-1, 1, 1)
    codes = codes[torch.isfinite(codes.float()).flatten()]
    scale = torch.full((len(codes), 1, 1), 0.37).half()
    assert torch.equal(get_codec("fp8").decode([codes, scale]), codes.float() * scale.float())
    assert len(codes) == 254


def test_fp8_codes_are_e4m3():
    rows = torch.tensor([[[448.0, -1.0, 0.0625, 17.0]]])
    codes, scale = encode("fp8", rows)
    assert scale.item() == 1.0
    assert codes.float().tolist() == [[[448.0, -1.0, 0.0625, 16.0]]]


def test_int4_halves_of_a_byte():
    rotated = torch.tensor([[[0.0, 1.0, 2.0, 15.0]]])
    codes, scale, minimum = encode("int4", hadamard(rotated) / 4 * 2)
    assert codes.tolist() == [[[0 + 16 * 2, 1 + 16 * 15]]]
    assert minimum.item() == 0
    assert 1 <= scale.item() <= 1.002


@pytest.mark.parametrize(("dim", "block"), [(1, 1), (2, 2), (16, 16), (128, 128), (96, 32), (80, 16)])
def test_the_rotation_is_sylvesters_matrix_on_blocks(dim, block):
    matrix = hadamard(torch.eye(dim))
    sylvester = torch.ones(1, 1)
    while len(sylvester) < block:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    assert torch.equal(matrix, torch.block_diag(*[sylvester] * (dim // block)))
    assert torch.equal(hadamard(matrix), block * torch.eye(dim))


def test_float16_below_is_the_largest_not_above():
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].float().sort().values.unique()
    between = (halves[:-1] + halves[1:]) / 2
    assert torch.equal(float16_below(halves).float(), halves)
    assert torch.equal(float16_below(between).float(), halves[:-1])
    assert float16_below(torch.tensor([1e6, -1e6, torch.inf])).tolist() == [65504, -torch.inf, torch.inf]
    assert float16_below(torch.tensor([torch.nan])).isnan().all()
