"""The table of wire dtypes, and what each codec's docstring says of its bytes."""

import pytest
import torch

from pdtrim_deploy.kvcache.codecs import CODECS, get_codec
from pdtrim_deploy.kvcache.codecs.rotated import INT3, INT4, hadamard, halvings
from pdtrim_deploy.plan.wire import CODES, ITEM_BYTES, SIDES, WIRE_DTYPES, packed_row_bytes, rotated_group, row_sections


def encode(wire, rows):
    """Rows `[n, heads, dim]` as sections."""
    sections = [
        torch.zeros(*rows.shape[:2], kind.per_head, dtype=getattr(torch, kind.dtype))
        for kind in row_sections(wire, str(rows.dtype).removeprefix("torch."), rows.shape[-1])
    ]
    get_codec(wire).encode(rows, slice(0, len(rows)), sections)
    return sections


def test_every_wire_dtype_has_codecs():
    assert tuple(CODECS) == CODES
    assert tuple(SIDES) == WIRE_DTYPES
    with pytest.raises(KeyError, match="unknown wire code 'int2'; use one of native, fp8, int8, int4, int3"):
        get_codec("int2")


def test_item_bytes_are_torchs():
    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES


@pytest.mark.parametrize("head_dim", [4, 8, 64, 80, 96, 112, 128, 256])
def test_int4_bytes_of_real_head_sizes(head_dim):
    group = {4: 4, 8: 8, 80: 16, 96: 32, 112: 16}.get(head_dim, 64)
    assert packed_row_bytes("int4", "bfloat16", 3, head_dim) == 3 * (head_dim // 2 + 2 * head_dim // group)
    if head_dim % 32 == 0:
        assert packed_row_bytes("int3", "bfloat16", 3, head_dim) == 3 * (head_dim * 3 // 8 + 2 * head_dim // group)


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


def test_int4_halves_of_a_byte_and_cells():
    """On the levels' scale: edges of cells belong to the upper one, but the slack keeps the largest in the last."""
    rotated = torch.tensor([[[-1.6, 0.0, 1.5, 0.3]]])
    codes, scale = encode("int4", hadamard(rotated) / 4 * 2)
    assert 1 <= scale.item() <= 1.002
    assert codes.tolist() == [[[0 + 16 * 15, 8 + 16 * 9]]]  # 1.5 * (6.6 - 1.5) = 7.65, 0.3 * (6.6 - 0.3) = 1.89


def test_int4_zeros_and_the_least():
    rows = torch.zeros(3, 1, 64)
    rows[1, 0, 0], rows[2] = 2.0**-30, -0.0
    codes, scale = encode("int4", rows)
    assert scale.flatten().tolist() == [0, 2.0**-24, 0]
    assert (codes == 0x88).all()
    back = get_codec("int4").decode([codes, scale])
    assert (back[[0, 2]] == 0).all()
    assert 0 < back[1].norm() < 2.0**-24


@pytest.mark.parametrize("dim", [64, 128])
def test_int4_magnitudes_at_the_end_of_float16(dim):
    rows = torch.tensor([7.3e4, 1.1e5]).view(2, 1, 1) * torch.ones(2, 1, dim) / dim**0.5
    codes, scale = encode("int4", rows)
    finite = get_codec("int4").decode([codes, scale]).isfinite().all(-1).flatten().tolist()
    assert finite == [True, False]
    assert not codes[1].any()


@pytest.mark.parametrize(("grid", "least", "most"), [(INT4, 0.0075, 0.0081), (INT3, 0.0312, 0.0322)])
def test_levels_are_the_means_of_their_cells(grid, least, most):
    """Of normal values in groups of 64; and the squared error is the docstring's."""
    groups = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    scale = groups.abs().amax(-1, keepdim=True) / grid.edge
    y = groups / scale
    codes = (y * (grid.curve - y.abs()) + grid.half).floor_().clamp_(0, 2**grid.bits - 1).long()
    levels = torch.tensor(grid.levels)
    for code, level in enumerate(grid.levels):
        weights = scale.square().expand_as(y)[codes == code]
        mean = (y[codes == code] * weights).sum() / weights.sum()
        assert abs(mean - level) < 0.003, code
    error = (levels[codes] * scale - groups).square().sum() / groups.square().sum()
    assert least < error < most


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_where_int3_puts_the_bits_of_a_channel(dim):
    """As the docstring says: one channel in the highest cell, the others in the lowest but one above the middle."""
    for channel in range(dim):
        y = torch.full((1, 1, dim), 0.1)
        y[0, 0, :: rotated_group(dim)] = -INT3.edge  # every group has scale 1, but for the slack
        y[0, 0, channel] = INT3.edge
        unit = 2.0 ** (halvings(dim) // 2)
        codes, _ = encode("int3", hadamard(y) * 2.0 ** -halvings(dim) * unit)
        expected = [4] * dim
        for start in range(0, dim, rotated_group(dim)):
            expected[start] = 0
        expected[channel] = 7
        bits = [codes[0, 0, at].item() for at in range(dim * 3 // 8)]
        for at, value in enumerate(expected):
            i, place = at % (dim // 2) // 2, at // (dim // 2) * 2 + at % 2
            third = bits[dim // 4 + i] >> place if i < dim // 8 else bits[dim // 8 + i] >> 4 + place
            assert (bits[i] >> 2 * place & 3) + 4 * (third & 1) == value, at


@pytest.mark.parametrize(("dim", "block"), [(1, 1), (2, 2), (16, 16), (128, 128), (96, 32), (80, 16)])
def test_the_rotation_is_sylvesters_matrix_on_blocks(dim, block):
    matrix = hadamard(torch.eye(dim))
    sylvester = torch.ones(1, 1)
    while len(sylvester) < block:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    assert torch.equal(matrix, torch.block_diag(*[sylvester] * (dim // block)))
    assert torch.equal(hadamard(matrix), block * torch.eye(dim))
