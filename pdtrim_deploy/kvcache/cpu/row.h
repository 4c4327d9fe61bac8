// One row of one side: gathered from a pool and encoded, or decoded and scattered.
#pragma once

#include "chunk.h"
#include "rotated.h"
#include "scaled.h"

namespace {

inline void copy_row(uint8_t* to, const uint8_t* from, int64_t bytes, bool stream) {
#if defined(__AVX512F__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    return;
  }
#endif
  (void)stream;
  memcpy(to, from, bytes);
}

inline void expect(const uint8_t* from, int64_t bytes, bool written) {
  for (int64_t i = 0; i < bytes; i += 64) written ? __builtin_prefetch(from + i, 1) : __builtin_prefetch(from + i, 0);
}

// What one head of a row travels less: its mean, turned (pdtrim_deploy/kvcache/key_offsets.py).
template <int kDim>
inline void turned(const float* mean, const float* turn, int dim, float* to) {
  const int half = (kDim ? kDim : dim) / 2;
  for (int i = 0; i < half; ++i) {
    const float low = mean[i], high = mean[half + i], cosine = turn[i], sine = turn[half + i];
    to[i] = low * cosine - high * sine;
    to[half + i] = high * cosine + low * sine;
  }
}

// One row of one side, and where its parts stand in the sections.
template <Dtype dtype, Code code, int kDim, bool kPack>
struct Row {
  static constexpr int item = item_of(dtype);
  uint8_t* values;
  uint8_t* codes;
  uint16_t* scales;
  int dim, groups, heads;
  int64_t next;  // bytes to a row that comes soon, to be fetched; 0 when the processor does by itself
  const float *mean, *factor, *turn;  // null when there is no offset

  template <Dtype from_dtype, int kHeads>
  void encode(const uint8_t* from) {
    if constexpr (is_rotated(code)) {
      kDim ? encode_rotated<from_dtype, code, kDim ? kDim : 64, kHeads>(from, codes, scales)
           : encode_rotated<from_dtype, code>(from, dim, codes, scales);
    } else {
      encode_heads<from_dtype, code, kDim, kHeads>(from, dim, codes, scales);
    }
  }

  template <Dtype to_dtype>
  void decode(int head, uint8_t* to) {
    if constexpr (is_rotated(code)) {
      const uint8_t* const at = codes + head * code_bytes(code, dim);
      kDim ? decode_rotated<to_dtype, code, kDim ? kDim : 64>(at, scales + head * groups, to)
           : decode_rotated<to_dtype, code>(at, scales + head * groups, dim, to);
    } else {
      decode_head<to_dtype, code, kDim>(codes + head * dim, scales[head], dim, to);
    }
  }

  f32 factors(int at, int lanes) const { return load<kFloat32>(reinterpret_cast<const uint8_t*>(factor + at), lanes); }

  // The row less its offset goes through float32: encoders and decoders know nothing of it.
  template <int kHeads>
  void encode_less() {
    alignas(64) float plain[kHeads * (kDim ? kDim : kMaxDim)];
    for (int h = 0; h < kHeads; ++h) {
      turned<kDim>(mean + h * dim, turn, dim, plain + h * dim);
      for (int i = 0; i < dim; i += kLanes) {
        const int lanes = dim - i < kLanes ? dim - i : kLanes;
        float* const at = plain + h * dim + i;
        const uint8_t* const offset = reinterpret_cast<const uint8_t*>(at);
        const f32 rest = load<dtype>(values + (h * dim + i) * item, lanes) - load<kFloat32>(offset, lanes);
        store<kFloat32>(reinterpret_cast<uint8_t*>(at), rest * factors(h * dim + i, lanes), lanes);
      }
    }
    encode<kFloat32, kHeads>(reinterpret_cast<const uint8_t*>(plain));
  }

  void decode_less(int head, uint8_t* to) {
    alignas(64) float plain[kDim ? kDim : kMaxDim], offset[kDim ? kDim : kMaxDim];
    decode<kFloat32>(head, reinterpret_cast<uint8_t*>(plain));
    turned<kDim>(mean + head * dim, turn, dim, offset);
    for (int i = 0; i < dim; i += kLanes) {
      const int lanes = dim - i < kLanes ? dim - i : kLanes;
      const f32 rest = load<kFloat32>(reinterpret_cast<const uint8_t*>(plain + i), lanes);
      const f32 whole = rest * factors(head * dim + i, lanes) +
                        load<kFloat32>(reinterpret_cast<const uint8_t*>(offset + i), lanes);
      store<dtype>(to + i * item, whole, lanes);
    }
  }

  template <int kHeads>
  void move() {  // kHeads heads at a time while there are so many, then fewer
    for (; heads >= kHeads; heads -= kHeads) {
      if (next) expect(values + next, kHeads * dim * item, !kPack);
      if constexpr (kPack) {
        mean ? encode_less<kHeads>() : encode<dtype, kHeads>(values);
      } else {
        for (int h = 0; h < kHeads; ++h) {
          uint8_t* const to = values + h * dim * item;
          mean ? decode_less(h, to) : decode<dtype>(h, to);
        }
      }
      values += kHeads * dim * item, codes += kHeads * code_bytes(code, dim);
      scales += kHeads * groups;
      if (mean) mean += kHeads * dim, factor += kHeads * dim;
    }
    if constexpr (kHeads > 1) move<kHeads - 1>();
  }
};

}  // namespace
