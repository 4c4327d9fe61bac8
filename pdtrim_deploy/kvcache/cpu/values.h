// Values of a pool, a vector at a time; of the last vector of a head only `lanes` are there, the others read as zero.
#pragma once

#include "numbers.h"

namespace {

template <Dtype dtype>
inline f32 load(const uint8_t* from, int lanes) {
  constexpr int item = item_of(dtype);
  uint8_t part[kLanes * item];
  if (lanes < kLanes) {
    memset(part, 0, sizeof(part));
    memcpy(part, from, lanes * item);
    from = part;
  }
  if constexpr (dtype == kFloat32) return get<f32>(from);
  if constexpr (dtype == kFloat16) return from_half(get<u16>(from));
  if constexpr (item == 1) return from_fp8<dtype>(get<u8>(from));
  return bits_as<f32>(widen(get<u16>(from)) << 16);
}

template <Dtype dtype>
inline void store(uint8_t* to, f32 x, int lanes) {
  constexpr int item = item_of(dtype);
  uint8_t part[kLanes * item];
  uint8_t* const at = lanes < kLanes ? part : to;
  if constexpr (dtype == kFloat32) {
    set(at, x);
  } else if constexpr (item == 1) {
    set(at, to_fp8<dtype>(x));
  } else {
    set(at, dtype == kFloat16 ? to_half(x) : to_bfloat(x));
  }
  if (lanes < kLanes) memcpy(to, part, lanes * item);
}

inline void store_codes(uint8_t* to, u8 codes, int lanes) {
  if (lanes < kLanes) {
    memcpy(to, &codes, lanes);
  } else {
    set(to, codes);
  }
}

inline u8 load_codes(const uint8_t* from, int lanes) {
  if (lanes == kLanes) return get<u8>(from);
  u8 codes{};
  memcpy(&codes, from, lanes);
  return codes;
}

}  // namespace
