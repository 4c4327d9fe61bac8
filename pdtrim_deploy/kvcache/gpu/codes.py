"""What the codes of the wire are in Triton: tiles of heads in, codes and scales out, and back. Needs triton.

A tile is `[VECTORS, WIDTH]`: a vector is one KV head of one row, `WIDTH` the power of two that holds its `DIM`
channels; channels past `DIM` are zero. Every form rounds alike: kernels are compiled without fused multiply-adds
(`UNFUSED`), each reduction is a maximum, sums go in the codec's order. bfloat16 is converted in integers, because the
interpreter rounds it otherwise, and e4m3 because sm_80 has no instruction for it: the same text runs everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdtrim_deploy.kvcache.codecs.rotated import INT3, INT4, SLACK, TINY

UNFUSED = {"enable_fp_fusion": False}  # a product, then a sum: fused they would be rounded once instead of twice
FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2 = (tl.constexpr(place) for place in range(5))  # `table.DTYPES`
NOT_FINITE: tl.constexpr = tl.constexpr(0x7F800000)  # and more: infinities and NaN, without their sign
HALF_NAN: tl.constexpr = tl.constexpr(0x7E00)  # which NaN is part of the format
LEAST: tl.constexpr = tl.constexpr(TINY)
CURVES: tl.constexpr = tl.constexpr((INT3.curve, INT4.curve))
PER_LARGEST: tl.constexpr = tl.constexpr((SLACK / INT3.edge, SLACK / INT4.edge))
LEVELS3: tl.constexpr = tl.constexpr(INT3.positive)
LEVELS4: tl.constexpr = tl.constexpr(INT4.positive)


@triton.jit
def floats_of(words, DTYPE: tl.constexpr):
    """float32 values of a pool's words."""
    if DTYPE == FLOAT32:
        x = words.to(tl.float32, bitcast=True)
    elif DTYPE == FLOAT16:
        x = words.to(tl.float16, bitcast=True).to(tl.float32)
    elif DTYPE == BFLOAT16:
        x = (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == E5M2:  # the upper half of a float16
        x = (words.to(tl.int16) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = tl.where((words & 0x7F) == 0x7F, float("nan"), e4m3_values(words) * 256.0)
    return x


@triton.jit
def words_of(x, DTYPE: tl.constexpr):
    """A pool's words of float32 values, rounded to nearest even; in fp8 saturated, and NaN is 0x7f."""
    bits = x.to(tl.int32, bitcast=True)
    broken = (bits & 0x7FFFFFFF) > NOT_FINITE
    if DTYPE == FLOAT32:
        words = bits
    elif DTYPE == FLOAT16:
        words = x.to(tl.float16).to(tl.int16, bitcast=True)
    elif DTYPE == BFLOAT16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        words = tl.where(broken, (bits >> 16) | 0x40, rounded).to(tl.int16)
    elif DTYPE == E4M3:
        words = tl.where(broken, 0x7F, e4m3_codes(within(tl.where(broken, 0.0, x), 448.0))).to(tl.int8)
    else:
        words = tl.where(broken, 0x7F, e5m2_codes(within(tl.where(broken, 0.0, x), 57344.0))).to(tl.int8)
    return words


@triton.jit
def within(x, MOST: tl.constexpr):
    """Numbers no further from 0 than MOST."""
    return tl.minimum(tl.maximum(x, -MOST), MOST)


@triton.jit
def offset_of(mean, turns, inside, channel, DIM: tl.constexpr):
    """float32 tile of what keys travel less, in the order of `key_offsets`; 0 where not `inside`.

    `mean` and `turns` point to each vector's mean and its position's cosines and sines.
    """
    HALF: tl.constexpr = DIM // 2
    lower = (channel < HALF)[None, :]
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)[None, :]
    angle = tl.where(channel < HALF, channel, channel - HALF)[None, :]
    centre = tl.load(mean[:, None] + channel[None, :], mask=inside, other=0.0)
    other = tl.load(mean[:, None] + partner, mask=inside, other=0.0)
    cosine = tl.load(turns[:, None] + angle, mask=inside, other=0.0)
    sine = tl.load(turns[:, None] + HALF + angle, mask=inside, other=0.0)
    return centre * cosine + tl.where(lower, -other, other) * sine


# --- int8 and fp8 ---------------------------------------------------------------------------------------------------


@triton.jit
def quantised(x, STEPS: tl.constexpr):
    """`x` in units of its vector's scale, within +-STEPS, and the bits of the float16 scales `[VECTORS]`."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # NaN is the largest
    broken = bits >= NOT_FINITE
    scale = tl.minimum(bits.to(tl.float32, bitcast=True) * (1.0 / STEPS), 65504.0).to(tl.float16)
    wide = scale.to(tl.float32)
    inverse = tl.where(wide == 0.0, 0.0, tl.math.div_rn(1.0, tl.where(wide == 0.0, 1.0, wide)))
    y = within(x * inverse[:, None], STEPS)
    y = tl.where(broken[:, None], 0.0, y)
    return y, tl.where(broken, HALF_NAN, scale.to(tl.int16, bitcast=True)).to(tl.int16)


@triton.jit
def int8_codes(y):
    """Nearest integers, ties to even: added to 1.5 * 2^23 they stand in the low bits."""
    return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def e4m3_codes(y):
    """Nearest e4m3 of |y| <= 448, ties to even."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # Below 2^-6 a code counts steps of 2^-9: added to 2^14, whose last bit is that, they stand in the low bits.
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (tl.where(magnitude < (121 << 23), small, normal) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def e5m2_codes(y):
    """Nearest e5m2 of |y| <= 57344, ties to even."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0xFFFFF + ((magnitude >> 21) & 1) - (112 << 23)) >> 21
    # Below 2^-14 a code counts steps of 2^-16, the last bit of 128.
    small = (tl.abs(y) + 128.0).to(tl.int32, bitcast=True) & 0x7
    return (tl.where(magnitude < (113 << 23), small, normal) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def e4m3_values(codes):
    """The values / 256: sign, exponent and mantissa stand where float16 has them."""
    return ((codes.to(tl.int16) << 7) & -0x4001).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


# --- int4 and int3 --------------------------------------------------------------------------------------------------


@triton.jit
def rotated(x, VECTORS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """Sylvester's Hadamard matrix on blocks of 2^STAGES channels; twice gives 2^STAGES times `x`."""
    for stage in tl.static_range(STAGES):
        x = butterfly(x, VECTORS, WIDTH, 2**stage)
    return x


@triton.jit
def butterfly(x, VECTORS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr):
    """Channels i and i + H become their sum and their difference."""
    a, b = tl.split(tl.permute(tl.reshape(x, [VECTORS, WIDTH // (2 * H), 2, H]), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [VECTORS, WIDTH])


@triton.jit
def grid_codes(x, BITS: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """int32 codes of rotated `x`, and the bits of the float16 scales `[VECTORS, WIDTH // GROUP]`."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    CURVE: tl.constexpr = CURVES[BITS - 3]
    PER: tl.constexpr = PER_LARGEST[BITS - 3]
    x = tl.reshape(x, [VECTORS, WIDTH // GROUP, GROUP])
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    scale = (bits.to(tl.float32, bitcast=True) * PER + LEAST).to(tl.float16)
    scale_bits = scale.to(tl.int16, bitcast=True)
    broken = (tl.max(scale_bits & 0x7FFF, axis=1) >= 0x7C00)[:, None]  # any group's breaks the head
    y = x * tl.math.div_rn(1.0, scale.to(tl.float32))[:, :, None]
    codes = (y * (CURVE - tl.abs(y)) + HALF).to(tl.int32) & (2 * HALF - 1)
    codes = tl.where(broken, 0, tl.reshape(codes, [VECTORS, WIDTH]))
    return codes, tl.where(broken, HALF_NAN, tl.where(bits == 0, 0, scale_bits)).to(tl.int16)


@triton.jit
def grid_levels(codes, BITS: tl.constexpr):
    """float32 levels of codes."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    LEVELS: tl.constexpr = LEVELS3 if BITS == 3 else LEVELS4
    upper = codes >= HALF
    place = tl.where(upper, codes - HALF, HALF - 1 - codes)
    level = tl.zeros_like(place).to(tl.float32) + LEVELS[0]
    for i in tl.static_range(1, HALF):
        level = tl.where(place == i, LEVELS[i], level)
    return tl.where(upper, level, -level)


@triton.jit
def halves(x, VECTORS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The lower and the upper half of the first DIM columns, `[VECTORS, WIDTH // 2]` each."""
    if DIM == WIDTH:
        lower, upper = tl.split(tl.permute(tl.reshape(x, [VECTORS, 2, WIDTH // 2]), (0, 2, 1)))
    else:
        column = tl.zeros([VECTORS, 1], tl.int32) + tl.arange(0, WIDTH // 2)[None, :]
        lower, upper = tl.gather(x, column, 1), tl.gather(x, tl.minimum(column + DIM // 2, WIDTH - 1), 1)
    return lower, upper


@triton.jit
def nibbles(codes, VECTORS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Bytes `[VECTORS, WIDTH // 2]`: a channel of the lower half low, of the upper half high."""
    lower, upper = halves(codes, VECTORS, WIDTH, DIM)
    return (lower | (upper << 4)).to(tl.int8)


@triton.jit
def threes(codes, VECTORS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Bytes of four codes' low two bits `[VECTORS, WIDTH // 4]`, and of their third bits `[VECTORS, WIDTH // 8]`."""
    lower, upper = halves(codes, VECTORS, WIDTH, DIM)
    a, b = tl.split(tl.reshape(lower, [VECTORS, WIDTH // 4, 2]))
    c, d = tl.split(tl.reshape(upper, [VECTORS, WIDTH // 4, 2]))
    low = (a & 3) | ((b & 3) << 2) | ((c & 3) << 4) | ((d & 3) << 6)
    third = (a >> 2) | ((b >> 2) << 1) | ((c >> 2) << 2) | ((d >> 2) << 3)
    return low.to(tl.int8), nibbles(third, VECTORS, WIDTH // 4, DIM // 4)


@triton.jit
def load_codes(source, inside, channel, BITS: tl.constexpr, DIM: tl.constexpr):
    """int32 codes of a tile; `source` points to each vector's first byte."""
    above = channel >= DIM // 2
    place = tl.where(above, channel - DIM // 2, channel)
    if BITS == 4:
        byte = tl.load(source[:, None] + place[None, :], mask=inside, other=0).to(tl.int32)
        codes = (byte >> tl.where(above, 4, 0)[None, :]) & 15
    else:
        at = place // 2
        which = tl.where(above, 2, 0) + place % 2
        late = at >= DIM // 8
        thirds = tl.where(late, at + DIM // 8, at + DIM // 4)
        low = tl.load(source[:, None] + at[None, :], mask=inside, other=0).to(tl.int32)
        high = tl.load(source[:, None] + thirds[None, :], mask=inside, other=0).to(tl.int32)
        third = (high >> (which + tl.where(late, 4, 0))[None, :]) & 1
        codes = ((low >> (2 * which)[None, :]) & 3) | (third << 2)
    return codes
