// int4 and int3: heads rotated, one scale for each group of 64 values.
#pragma once

#include <cmath>

#include "grid.h"
#include "packed_codes.h"
#include "rotation.h"

namespace {

// Quarter g of the result: quarters of the largest of the 16 lanes of m[g].
inline u32 reduce_four(const u32 (&m)[4]) {
  const u32 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const u32 even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const u32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const u32 a = larger(__builtin_shuffle(m[0], m[1], low), __builtin_shuffle(m[0], m[1], low + 8));
  const u32 b = larger(__builtin_shuffle(m[2], m[3], low), __builtin_shuffle(m[2], m[3], low + 8));
  const u32 c = larger(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 4));
  const u32 d = larger(c, __builtin_shuffle(c, lane ^ 2));
  return larger(d, __builtin_shuffle(d, lane ^ 1));
}

// Heads with a scale that is not finite: all their scales become NaN, their codes 0.
inline void mark_broken(int heads, int bytes, int groups, uint8_t* codes, uint16_t* scales) {
  for (int h = 0; h < heads; ++h, scales += groups, codes += bytes) {
    bool bad = false;
    for (int g = 0; g < groups; ++g) bad |= (scales[g] & 0x7c00) == 0x7c00;
    if (!bad) continue;
    for (int g = 0; g < groups; ++g) scales[g] = kHalfNaN;
    memset(codes, 0, bytes);
  }
}

// Several heads of 64 or 128 channels, one scale for four vectors; up to four groups.
template <Dtype dtype, Code code, int kDim, int kHeads>
inline void encode_rotated(const uint8_t* from, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype), kVectors = kDim / kLanes, kGroups = kDim / kGroup * kHeads;
  constexpr int kBytes = code_bytes(code, kDim);
  const float unit = half_to_the(log2_of(kDim) / 2);
  f32 x[kHeads][kVectors], broken{};
  u32 most[kGroups];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += 2) load_pair<dtype>(from + (h * kDim + v * kLanes) * item, x[h][v], x[h][v + 1]);
    rotate_pairs<kDim>(x[h]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const f32* const group = &x[0][0] + g * 4;
    u32 bits[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bits[i] = bits_as<u32>(group[i]) & 0x7fffffffu;
    most[g] = larger(larger(bits[0], bits[1]), larger(bits[2], bits[3]));  // NaN is the largest
  }
  static_assert(kGroups <= 4, "one reduction");
  constexpr int last = kGroups - 1;
  const u32 four = reduce_four({most[0], most[last < 1 ? last : 1], most[last < 2 ? last : 2], most[last]});
  const Steps steps = steps_of<code>(four, unit, broken);
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) scales[g] = steps.scale[g * 4];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors / 2; v += 2) {
      const int w = v + kVectors / 2;
      const float first = steps.by[(h * kVectors + v) / 4 * 4], second = steps.by[(h * kVectors + w) / 4 * 4];
      store_four<code, kDim>(codes + h * kBytes, v * kLanes, codes_of<code>(x[h][v], first),
                             codes_of<code>(x[h][v + 1], first), codes_of<code>(x[h][w], second),
                             codes_of<code>(x[h][w + 1], second));
    }
  }
  if (__builtin_expect(!all_zero(broken), 0)) mark_broken(kHeads, kBytes, kDim / kGroup, codes, scales);
}

template <Dtype dtype, Code code, int kDim>
inline void decode_rotated(const uint8_t* codes, const uint16_t* scales, uint8_t* to) {
  constexpr int item = item_of(dtype), kVectors = kDim / kLanes;
  const float unit = half_to_the((log2_of(kDim) + 1) / 2);
  f32 x[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors / 2; v += 2) {
    const int w = v + kVectors / 2;
    const float first = from_half(scales[v / 4]), second = from_half(scales[w / 4]);
    const Four four = load_four<code, kDim>(codes, v * kLanes);
    x[v] = levels_of<code>(four.even) * first, x[v + 1] = levels_of<code>(four.odd) * first;
    x[w] = levels_of<code>(four.even_above) * second, x[w + 1] = levels_of<code>(four.odd_above) * second;
  }
  rotate_pairs<kDim>(x);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; v += 2) store_pair<dtype>(to + v * kLanes * item, x[v] * unit, x[v + 1] * unit);
}

// One head of any size.
template <Dtype dtype, Code code>
void encode_rotated(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype);
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = rotated_group(dim);
  const float unit = half_to_the(log2_of(size) / 2);
  f32 x[kMaxDim / kLanes], broken{};
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    x[v] = load<dtype>(from + v * kLanes * item, lanes < kLanes ? lanes : kLanes);
  }
  rotate(x, vectors, size);
  uint32_t flat[kMaxDim];
  memcpy(flat, x, sizeof(float) * dim);
  for (int at = 0, g = 0; at < dim; at += group, ++g) {
    uint32_t most = 0;
    for (int i = at; i < at + group; ++i) most = larger(flat[i] & 0x7fffffffu, most);
    const Steps steps = steps_of<code>(u32{} + most, unit, broken);
    scales[g] = steps.scale[0];
    for (int i = at; i < at + group; ++i) {
      const float y = bits_as<float>(flat[i]) * steps.by[0];
      flat[i] = uint32_t(int32_t(y * (Grid<code>::curve - std::fabs(y)) + Grid<code>::half));
    }
  }
  memset(codes, 0, code_bytes(code, dim));
  for (int i = 0; i < dim; ++i) store_code<code>(codes, i, dim, flat[i]);
  if (!all_zero(broken)) mark_broken(1, code_bytes(code, dim), dim / group, codes, scales);
}

template <Dtype dtype, Code code>
void decode_rotated(const uint8_t* codes, const uint16_t* scales, int dim, uint8_t* to) {
  constexpr int item = item_of(dtype);
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = rotated_group(dim);
  const float unit = half_to_the((log2_of(size) + 1) / 2);
  float flat[kMaxDim] = {};
  for (int at = 0; at < dim; at += group) {
    const float scale = from_half(scales[at / group]);
    for (int i = at; i < at + group; ++i) {
      flat[i] = Grid<code>::levels[load_code<code>(codes, i, dim)] * scale;
    }
  }
  f32 x[kMaxDim / kLanes];
  memcpy(x, flat, sizeof(f32) * vectors);
  rotate(x, vectors, size);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    store<dtype>(to + v * kLanes * item, x[v] * unit, lanes < kLanes ? lanes : kLanes);
  }
}

}  // namespace
