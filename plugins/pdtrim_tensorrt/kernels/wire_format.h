// The bytes of one layer's KV on the wire: layout, index arithmetic and scalar codecs, those of pdtrim_deploy/plan/wire.py and
// pdtrim_deploy/kvcache (layout.py, codecs/), which tests hold this to bit for bit. Plain C++: no CUDA, no TensorRT.
// There is no int4 here.
//
// One layer occupies [offset, offset + 2 * side_bytes) of the staging buffer: the side of K, then the side of V.
// H = KV heads, D = head_dim, R = rows sent.
//
//   native   side = values [R][H * D] in the pool's dtype.                           side_bytes = R * H * D * item
//   int8     side = codes  [R][H * D] int8,  then scales [R][H] float16.             side_bytes = R * H * (D + 2)
//   fp8      side = codes  [R][H * D] e4m3fn, then scales [R][H] float16.            side_bytes = R * H * (D + 2)
//
// A scale belongs to one row and one KV head and is symmetric (no zero point). In float32, then rounded as said:
//   amax  = max |x| over the head's D values
//   scale = float16(min(amax * float32(1 / qmax), 65504)); qmax = 127 (int8), 448 (fp8)
//           NaN (0x7e00) where a value is not finite: nothing of that head then reads as a number
//   y     = x * (1 / float32(scale)), or 0 where scale is 0
//   code  = int8: clamp(rint(y), -127, 127); fp8: e4m3fn(clamp(y, -448, 448)); 0 where scale is NaN
//   value = float32(code) * float32(scale)
// float16, rint and e4m3fn round to nearest even. Codes are made with the *rounded* scale, the one the receiver
// multiplies by. -128 is never sent.
//
// D is even for int8 and fp8 (RoPE wants that anyway): then scales are 2-byte aligned, a quantised layer takes a
// multiple of 4 bytes, and a native layer that follows it is aligned for its dtype.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PDTRIM_BOTH __host__ __device__ __forceinline__
#else
#include <cmath>
#define PDTRIM_BOTH inline
#endif

namespace pdtrim {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Wire : int32_t { kNative = 0, kInt8 = 1, kFp8 = 2 };

constexpr int32_t kScaleBytes = 2;
constexpr float kMaxScale = 65504.0f;

PDTRIM_BOTH int32_t item_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// --- layout ---------------------------------------------------------------------------------------------------------

struct Layout {
  int64_t rows;
  int32_t heads;
  int32_t dim;
  int32_t item;  // bytes of one value in the pool
  int32_t wire;

  PDTRIM_BOTH int64_t width() const { return int64_t{heads} * dim; }
  PDTRIM_BOTH int64_t code_bytes() const { return wire == kNative ? item : 1; }
  PDTRIM_BOTH int64_t side_bytes() const {
    return rows * (width() * code_bytes() + (wire == kNative ? 0 : int64_t{heads} * kScaleBytes));
  }
  // Bytes from the pool's first to that of one value of slot `slot`.
  PDTRIM_BOTH int64_t source(int64_t slot, int32_t head) const { return (slot * width() + int64_t{head} * dim) * item; }
  // Bytes from the layer's first to that of one head's values (codes) in row `row` of `side` (0 = K, 1 = V).
  PDTRIM_BOTH int64_t codes(int32_t side, int64_t row, int32_t head) const {
    return side * side_bytes() + (row * width() + int64_t{head} * dim) * code_bytes();
  }
  PDTRIM_BOTH int64_t scale(int32_t side, int64_t row, int32_t head) const {
    return side * side_bytes() + rows * width() + (row * heads + head) * kScaleBytes;
  }
};

// --- scalar codecs, in integers where a format is narrow: the same bits on every processor --------------------------

template <typename To, typename From>
PDTRIM_BOTH To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// float16 -> float32, exact; infinities and NaN stay what they are.
PDTRIM_BOTH float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_as<float>(sign | magnitude | 0x70000000u);
  const float value = bits_as<float>(magnitude) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

PDTRIM_BOTH float from_bfloat(uint16_t bfloat) { return bits_as<float>(uint32_t(bfloat) << 16); }

// float32 in [0, 65504] -> float16.
PDTRIM_BOTH uint16_t to_half(float value) {
  if (value < 0x1p-14f) return uint16_t(rintf(value * 0x1p24f));
  uint32_t bits = bits_as<uint32_t>(value);
  bits += 0xfffu + ((bits >> 13) & 1u);
  return uint16_t((bits - (112u << 23)) >> 13);
}

// float32 -> e4m3fn, saturating at 448; NaN stays NaN.
PDTRIM_BOTH uint8_t to_e4m3(float value) {
  const uint8_t sign = uint8_t((bits_as<uint32_t>(value) >> 24) & 0x80u);
  float magnitude = fabsf(value);
  if (magnitude != magnitude) return uint8_t(sign | 0x7fu);
  magnitude = fminf(magnitude, 448.0f);
  if (magnitude < 0x1p-6f) return uint8_t(sign | uint8_t(rintf(magnitude * 512.0f)));
  uint32_t bits = bits_as<uint32_t>(magnitude);
  bits += 0x7ffffu + ((bits >> 20) & 1u);
  return uint8_t(sign | ((bits - (120u << 23)) >> 20));
}

template <int32_t dtype>
PDTRIM_BOTH float load(const void* values, int64_t index) {
  if (dtype == kFloat32) return static_cast<const float*>(values)[index];
  const uint16_t bits = static_cast<const uint16_t*>(values)[index];
  return dtype == kFloat16 ? from_half(bits) : from_bfloat(bits);
}

// |x| as an integer: in the order of magnitudes, infinity above every number, NaN above infinity.
PDTRIM_BOTH uint32_t magnitude(float value) { return bits_as<uint32_t>(value) & 0x7fffffffu; }

PDTRIM_BOTH uint32_t larger(uint32_t one, uint32_t other) { return one > other ? one : other; }

template <int32_t wire>
PDTRIM_BOTH uint16_t scale_bits(uint32_t largest) {
  if (largest >= 0x7f800000u) return 0x7e00u;
  const float amax = bits_as<float>(largest);
  return to_half(fminf(amax * (wire == kInt8 ? 1.0f / 127.0f : 1.0f / 448.0f), kMaxScale));
}

PDTRIM_BOTH float inverse(uint16_t scale) { return scale ? 1.0f / from_half(scale) : 0.0f; }

template <int32_t wire>
PDTRIM_BOTH uint8_t code(float value, float inverse_scale) {
  const float scaled = value * inverse_scale;
  if (scaled != scaled) return 0;  // the scale is NaN
  if (wire == kFp8) return to_e4m3(scaled);
  return uint8_t(int8_t(fmaxf(fminf(rintf(scaled), 127.0f), -127.0f)));
}

}  // namespace pdtrim
