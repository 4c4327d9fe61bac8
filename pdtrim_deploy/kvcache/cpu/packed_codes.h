// Where codes of int4 and int3 stand: low bits of both halves of a head side by side, third bits behind them.
#pragma once

#include "codes.h"
#include "vectors.h"

namespace {

// Codes of channels 2l, 2l + 1 (of both halves of a head) of 16 lanes l, from `at` = 2 * first lane on.
template <Code code, int kDim>
inline void store_four(uint8_t* codes, int at, u32 even, u32 odd, u32 even_above, u32 odd_above) {
  if constexpr (code == kInt4) {
    set(codes + at, __builtin_convertvector((even | even_above << 4) | (odd | odd_above << 4) << 8, u16));
  } else {
    const u32 low = (even & 3u) | (odd & 3u) << 2 | (even_above & 3u) << 4 | (odd_above & 3u) << 6;
    const u32 high = even >> 2 | (odd >> 2) << 1 | (even_above >> 2) << 2 | (odd_above >> 2) << 3;
    set(codes + at / 2, narrow(low));
    uint8_t* const thirds = codes + kDim / 4;
    if constexpr (kDim == 64) {  // eight lanes are half of the bytes
      const i32 upper = {8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
      const u8 bytes = narrow(high | __builtin_shuffle(high, upper) << 4);
      memcpy(thirds, &bytes, 8);
    } else if (at == 0) {
      set(thirds, narrow(high));
    } else {
      set(thirds, u8(get<u8>(thirds) | narrow(high << 4)));
    }
  }
}

struct Four {
  u32 even, odd, even_above, odd_above;  // codes in the low bits
};

template <Code code, int kDim>
inline Four load_four(const uint8_t* codes, int at) {
  if constexpr (code == kInt4) {
    const u32 both = widen(get<u16>(codes + at));
    return {both, both >> 8, both >> 4, both >> 12};
  } else {
    const u32 low = u32(widen(get<u8>(codes + at / 2)));
    u32 high;
    if constexpr (kDim == 64) {
      u8 bytes{};
      memcpy(&bytes, codes + kDim / 4, 8);
      const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
      const u32 shift = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
      high = __builtin_shuffle(u32(widen(bytes)), lane) >> shift;
    } else {
      high = u32(widen(get<u8>(codes + kDim / 4))) >> (at ? 4 : 0);
    }
    return {(low & 3u) | (high & 1u) << 2, (low >> 2 & 3u) | (high & 2u) << 1, (low >> 4 & 3u) | (high & 4u),
            (low >> 6) | (high & 8u) >> 1};
  }
}

// Where the code of channel i stands, of a head of any size.
template <Code code>
inline uint32_t load_code(const uint8_t* codes, int i, int dim) {
  const bool above = i >= dim / 2;
  if (above) i -= dim / 2;
  if constexpr (code == kInt4) return above ? codes[i] >> 4 : codes[i] & 15;
  const int at = i / 2, which = above * 2 + i % 2, eighth = dim / 8;
  const uint32_t thirds = at < eighth ? codes[dim / 4 + at] : codes[eighth + at] >> 4;
  return (codes[at] >> 2 * which & 3) | (thirds >> which & 1) << 2;
}

template <Code code>
inline void store_code(uint8_t* codes, int i, int dim, uint32_t value) {  // into zeros
  const bool above = i >= dim / 2;
  if (above) i -= dim / 2;
  if constexpr (code == kInt4) {
    codes[i] |= uint8_t(above ? value << 4 : value);
  } else {
    const int at = i / 2, which = above * 2 + i % 2, eighth = dim / 8;
    codes[at] |= uint8_t((value & 3) << 2 * which);
    codes[at < eighth ? dim / 4 + at : eighth + at] |= uint8_t((value >> 2) << which << (at < eighth ? 0 : 4));
  }
}

}  // namespace
