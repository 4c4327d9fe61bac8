// int8 and fp8: a scale for each head.
#pragma once

#include "codes.h"
#include "values.h"

namespace {

inline u8 int8_codes(f32 y) {  // |y| <= 127: added to 1.5 * 2^23, the nearest integer stands in the low bits
  return narrow(bits_as<u32>(y + 12582912.0f));
}

// Several heads at a time, so that their chains of dependent steps overlap.
template <Dtype dtype, Code code, int kDim, int kHeads>
inline void encode_heads(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype), kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  constexpr float steps = code == kInt8 ? 127.0f : 448.0f;
  dim = kDim ? kDim : dim;
  f32 x[kHeads][kVectors];
  u32 most[kHeads] = {};
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int i = 0, v = 0; i < dim; i += kLanes, ++v) {
      x[h][v] = load<dtype>(from + (h * dim + i) * item, dim - i < kLanes ? dim - i : kLanes);
      most[h] = larger(most[h], bits_as<u32>(x[h][v]) & 0x7fffffffu);
    }
  }
  float by[kHeads];
  uint32_t broken = 0;
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    const uint32_t magnitude = largest_lane(most[h]);
    const float wanted = bits_as<float>(magnitude) * (1.0f / steps);
    const uint16_t scale = to_half(wanted < kHalfMax ? wanted : kHalfMax);
    scales[h] = scale;
    by[h] = scale ? 1.0f / from_half(scale) : 0.0f;
    broken |= uint32_t{magnitude >= 0x7f800000u} << h;
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int i = 0, v = 0; i < dim; i += kLanes, ++v) {
      const f32 y = larger(smaller(x[h][v] * by[h], all(steps)), all(-steps));
      const u8 bytes = code == kInt8 ? int8_codes(y) : e4m3_codes(y);
      store_codes(codes + h * dim + i, bytes, dim - i < kLanes ? dim - i : kLanes);
    }
  }
  if (__builtin_expect(broken, 0)) {
    for (int h = 0; h < kHeads; ++h) {
      if (!(broken >> h & 1)) continue;
      scales[h] = kHalfNaN;
      memset(codes + h * dim, 0, dim);
    }
  }
}

template <Dtype dtype, Code code, int kDim>
inline void decode_head(const uint8_t* codes, uint16_t scale, int dim, uint8_t* to) {
  constexpr int item = item_of(dtype);
  dim = kDim ? kDim : dim;
  const float by = from_half(scale) * (code == kInt8 ? 1.0f : 256.0f);
#pragma GCC unroll 16
  for (int i = 0; i < dim; i += kLanes) {
    const int lanes = dim - i < kLanes ? dim - i : kLanes;
    const u8 bytes = load_codes(codes + i, lanes);
    f32 x;
    if constexpr (code == kInt8) {
      x = to_float(widen(i8(bytes)));
    } else {  // sign, exponent and mantissa where float16 has them: the value / 256
      x = from_half(u16((widen_once(i8(bytes)) << 7) & int16_t(0xbfff)));
    }
    store<dtype>(to + i * item, x * by, lanes);
  }
}

}  // namespace
