// Numbers of a pool, to float32 and back: float16 and bfloat16, nearest even; fp8, nearest even and saturated (NaN is
// 0x7f).
#pragma once

#include "vectors.h"

namespace {

enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kE4m3, kE5m2 };
constexpr int item_of(Dtype dtype) { return dtype == kFloat32 ? 4 : dtype == kE4m3 || dtype == kE5m2 ? 1 : 2; }  // bytes

constexpr uint16_t kHalfNaN = 0x7e00;
constexpr float kHalfMax = 65504.0f;

inline f32 from_half(u16 half) {
#if defined(__AVX512F__)
  return f32(_mm512_cvtph_ps(__m256i(half)));
#else
  const u32 wide = widen(half), magnitude = (wide & 0x7fffu) << 13;
  const u32 value = bits_as<u32>(bits_as<f32>(magnitude) * 0x1p112f);
  const u32 special = magnitude | 0x70000000u;
  return bits_as<f32>((magnitude >= 0x0f800000u ? special : value) | (wide & 0x8000u) << 16);
#endif
}

inline u16 to_half(f32 x) {
#if defined(__AVX512F__)
  return u16(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const u32 bits = bits_as<u32>(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const u32 small = bits_as<u32>(bits_as<f32>(magnitude) + 0.5f) - 0x3f000000u;  // 0.5's last bit is 2^-24
  u32 half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= 0x477ff000u ? u32{} + 0x7c00u : half;  // 65520 and more
  half = magnitude > 0x7f800000u ? u32{} + uint32_t{kHalfNaN} : half;
  return __builtin_convertvector(half | sign, u16);
#endif
}

inline float from_half(uint16_t half) {
  u16 one{};
  one[0] = half;
  return from_half(one)[0];
}

inline uint16_t to_half(float x) {
  f32 one{};
  one[0] = x;
  return to_half(one)[0];
}

inline u16 to_bfloat(f32 x) {
#if defined(__AVX512BF16__)
  return u16(_mm512_cvtneps_pbh(__m512(x)));  // takes subnormals for zero: a product of a scale and a code is none
#else
  const u32 bits = bits_as<u32>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, u16);
#endif
}

// |y| <= 448. Added to 1.5 * 2^20 times its own power of two, y loses all but 3 bits of mantissa (below 2^-6: all but
// steps of 2^-9); times 2^-120 its exponent is e4m3's.
inline u8 e4m3_codes(f32 y) {
  const u32 power = bits_as<u32>(y) & 0x7f800000u, least = u32{} + (121u << 23);
  const f32 magic = bits_as<f32>(larger(power, least) + ((20u << 23) + 0x400000u));
  const u32 bits = bits_as<u32>(((y + magic) - magic) * 0x1p-120f);
  return narrow(bits >> 20 | (bits_as<u32>(y) >> 24 & 0x80u));  // y's own sign: -0 is told from 0
}

// |y| <= 57344. The same with 2 bits of mantissa, and below 2^-14 steps of 2^-16.
inline u8 e5m2_codes(f32 y) {
  const u32 power = bits_as<u32>(y) & 0x7f800000u, least = u32{} + (113u << 23);
  const f32 magic = bits_as<f32>(larger(power, least) + ((21u << 23) + 0x400000u));
  const u32 bits = bits_as<u32>(((y + magic) - magic) * 0x1p-112f);
  return narrow(bits >> 21 | (bits_as<u32>(y) >> 24 & 0x80u));
}

template <Dtype dtype>
inline u8 to_fp8(f32 x) {
  constexpr float most = dtype == kE4m3 ? 448.0f : 57344.0f;
  const f32 y = larger(smaller(x, all(most)), all(-most));  // a number, whatever becomes of NaN
  const u8 codes = dtype == kE4m3 ? e4m3_codes(y) : e5m2_codes(y);
  const u32 magnitude = bits_as<u32>(x) & 0x7fffffffu;
  return narrow(magnitude > 0x7f800000u ? u32{} + 0x7fu : u32(widen(codes)));
}

template <Dtype dtype>
inline f32 from_fp8(u8 codes) {
  if constexpr (dtype == kE5m2) return from_half(u16(widen_once(i8(codes)) << 8));
  // Sign, exponent and mantissa where float16 has them: the value / 256, but for NaN.
  const f32 value = from_half(u16((widen_once(i8(codes)) << 7) & int16_t(0xbfff))) * 256.0f;
  return bits_as<f32>((u32(widen(codes)) & 0x7fu) == 0x7fu ? u32{} + 0x7fc00000u : bits_as<u32>(value));
}

}  // namespace
