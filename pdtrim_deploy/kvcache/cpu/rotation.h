// The rotation before int4 and int3, and a head's vectors in the order that it wants.
#pragma once

#include "values.h"

namespace {

template <int h>
inline f32 butterfly(f32 x) {  // lanes i and i ^ h become their sum and difference
  const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32 sign = bits_as<f32>(((lane & h) != 0 ? i32{} + int32_t(0x80000000) : i32{}) | 0x3f800000);
  return exact_fma(x, sign, __builtin_shuffle(x, lane ^ h));
}

// Vectors v and v + h become their sum and difference, for h = first, 2 first, .. below `size`.
inline void rotate_vectors(f32* x, int vectors, int first, int size) {
#pragma GCC unroll 8
  for (int h = first; h < size; h *= 2) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      if (v & h) continue;
      const f32 a = x[v], b = x[v + h];
      x[v] = a + b, x[v + h] = a - b;
    }
  }
}

// Sylvester's Hadamard matrix on blocks of `size` values, a power of two, by sums and differences in this order.
inline void rotate(f32* x, int vectors, int size) {
  for (int v = 0; v < vectors; ++v) {
    if (size > 1) x[v] = butterfly<1>(x[v]);
    if (size > 2) x[v] = butterfly<2>(x[v]);
    if (size > 4) x[v] = butterfly<4>(x[v]);
    if (size > 8) x[v] = butterfly<8>(x[v]);
  }
  rotate_vectors(x, vectors, 1, size / kLanes);
}

// The same on one block of kDim values, vectors of the even and of the odd ones of each 32 in turn: a bfloat16 pool is
// read and written in such pairs without a shuffle, and so are the codes.
template <int kDim>
inline void rotate_pairs(f32* x) {
  constexpr int kVectors = kDim / kLanes;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v += 2) {
    const f32 a = x[v], b = x[v + 1];
    x[v] = a + b, x[v + 1] = a - b;
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) x[v] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x[v]))));
  rotate_vectors(x, kVectors, 2, kVectors);
}

template <Dtype dtype>
inline void load_pair(const uint8_t* from, f32& even, f32& odd) {
  if constexpr (dtype == kBFloat16) {
    const u32 both = get<u32>(from);
    even = bits_as<f32>(both << 16), odd = bits_as<f32>(both & 0xffff0000u);
  } else {
    const i32 twice = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const f32 a = load<dtype>(from, kLanes), b = load<dtype>(from + kLanes * item_of(dtype), kLanes);
    even = __builtin_shuffle(a, b, twice), odd = __builtin_shuffle(a, b, twice + 1);
  }
}

template <Dtype dtype>
inline void store_pair(uint8_t* to, f32 even, f32 odd) {
  if constexpr (dtype == kBFloat16) {
#if defined(__AVX512BF16__)
    using u16x32 = uint16_t __attribute__((vector_size(64)));
    const u16x32 zip = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                        29, 14, 30, 15, 31};
    set(to, __builtin_shuffle(u16x32(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even))), zip));  // see to_bfloat
    return;
#endif
    set(to, widen(to_bfloat(even)) | widen(to_bfloat(odd)) << 16);
  } else {
    const i32 zip = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    store<dtype>(to, __builtin_shuffle(even, odd, zip), kLanes);
    store<dtype>(to + kLanes * item_of(dtype), __builtin_shuffle(even, odd, zip + 8), kLanes);
  }
}

inline int log2_of(int size) { return __builtin_ctz(size); }
inline float half_to_the(int n) { return bits_as<float>(uint32_t(127 - n) << 23); }

}  // namespace
