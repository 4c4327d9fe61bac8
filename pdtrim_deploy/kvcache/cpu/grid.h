// int4 and int3: values of a group to codes under its scale, and back.
#pragma once

#include "codes.h"
#include "numbers.h"

namespace {

constexpr int kGroup = 64;
inline int rotated_group(int dim) { return (dim & -dim) < kGroup ? dim & -dim : kGroup; }

template <Code code>
struct Grid;  // of int4 and int3: half the number of cells; a scale is rounded up; levels repeat to fill a vector
template <>
struct Grid<kInt4> {
  static constexpr float half = 8.0f, curve = 6.6f, per_largest = float((1 + 0x1p-10) / 1.6);
  static constexpr float levels[16] = {-1.5093f, -1.1933f, -0.9707f, -0.7669f, -0.5782f, -0.4017f, -0.2352f, -0.077f,
                                       0.077f, 0.2352f, 0.4017f, 0.5782f, 0.7669f, 0.9707f, 1.1933f, 1.5093f};
};
template <>
struct Grid<kInt3> {
  static constexpr float half = 4.0f, curve = 4.45f, per_largest = float((1 + 0x1p-10) / 1.25);
  static constexpr float levels[16] = {-1.0297f, -0.6422f, -0.3613f, -0.1158f, 0.1158f, 0.3613f, 0.6422f, 1.0297f,
                                       -1.0297f, -0.6422f, -0.3613f, -0.1158f, 0.1158f, 0.3613f, 0.6422f, 1.0297f};
};

struct Steps {  // how the values of a group become codes: of four groups, each in a quarter of the lanes
  float by[kLanes];
  u16 scale;
};

// From the bits of the largest magnitude of a group before it is multiplied by `unit`, a power of two; `by` is for
// such values too. `broken` becomes NaN if the scale is not finite.
template <Code code>
inline Steps steps_of(u32 most, float unit, f32& broken) {
  Steps steps;
  const f32 largest = bits_as<f32>(most) * unit;
  const u16 scale = to_half(largest * Grid<code>::per_largest + 0x1p-24f);
  const f32 wide = from_half(scale);
  broken = exact_fma(wide, f32{}, broken);
  set(steps.by, (1.0f / wide) * unit);
  steps.scale = scale & __builtin_convertvector(bits_as<u32>(largest) != 0u, u16);  // 0 for zeros
  return steps;
}

template <Code code>
inline u32 codes_of(f32 x, float by) {  // the whole part of 0 .. twice the half
  const f32 y = x * by;
  const f32 place = y * (Grid<code>::curve - bits_as<f32>(bits_as<u32>(y) & 0x7fffffffu)) + Grid<code>::half;
  return u32(__builtin_convertvector(place, i32));
}

template <Code code>
inline f32 levels_of(u32 codes) {  // of the low bits
#if defined(__AVX512F__)
  return f32(_mm512_permutexvar_ps(__m512i(codes), __m512(get<f32>(Grid<code>::levels))));
#else
  return __builtin_shuffle(get<f32>(Grid<code>::levels), i32(codes & 15u));
#endif
}

}  // namespace
