// Vectors of 16 lanes, and what the compiler has no word for. They are its own; intrinsics only where an instruction
// has no other name.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using f32 = float __attribute__((vector_size(64)));
using i32 = int32_t __attribute__((vector_size(64)));
using u32 = uint32_t __attribute__((vector_size(64)));
using u16 = uint16_t __attribute__((vector_size(32)));
using i16 = int16_t __attribute__((vector_size(32)));
using u8 = uint8_t __attribute__((vector_size(16)));
using i8 = int8_t __attribute__((vector_size(16)));
constexpr int kLanes = 16;

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
inline V get(const void* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
inline void set(void* to, V v) { memcpy(to, &v, sizeof(v)); }

inline bool all_zero(f32 x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(x), _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
#else
  bool zero = true;
  for (int i = 0; i < kLanes; ++i) zero &= x[i] == 0.0f;
  return zero;
#endif
}

inline f32 all(float x) { return f32{} + x; }

inline f32 smaller(f32 a, f32 b) {
#if defined(__AVX512F__)
  return f32(_mm512_min_ps(__m512(a), __m512(b)));
#else
  return a < b ? a : b;
#endif
}

inline f32 larger(f32 a, f32 b) {
#if defined(__AVX512F__)
  return f32(_mm512_max_ps(__m512(a), __m512(b)));
#else
  return a > b ? a : b;
#endif
}

// Integers between 8, 16 and 32 bits; the compiler's own conversions go through scalars, or halves.
inline u8 narrow(u32 x) {
#if defined(__AVX512F__)
  return u8(_mm512_cvtepi32_epi8(__m512i(x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, u16), u8);
#endif
}

inline i32 widen(u8 x) {
#if defined(__AVX512F__)
  return i32(_mm512_cvtepu8_epi32(__m128i(x)));
#else
  return i32(__builtin_convertvector(__builtin_convertvector(x, u16), u32));
#endif
}

inline u32 widen(u16 x) {
#if defined(__AVX512F__)
  return u32(_mm512_cvtepu16_epi32(__m256i(x)));
#else
  return __builtin_convertvector(x, u32);
#endif
}

inline i32 widen(i8 x) {
#if defined(__AVX512F__)
  return i32(_mm512_cvtepi8_epi32(__m128i(x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, i16), i32);
#endif
}

inline i16 widen_once(i8 x) {
#if defined(__AVX2__)
  return i16(_mm256_cvtepi8_epi16(__m128i(x)));
#else
  return __builtin_convertvector(x, i16);
#endif
}

inline f32 to_float(i32 x) { return __builtin_convertvector(x, f32); }

// a * b + c where a * b is exact: fused or not is the same.
inline f32 exact_fma(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
  return f32(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#else
  return a * b + c;
#endif
}

inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline uint32_t largest_lane(u32 x) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = most > x[i] ? most : x[i];
  return most;
}

}  // namespace
