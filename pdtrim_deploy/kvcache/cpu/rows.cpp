// Moves rows of KV between a paged pool and packed sections on a CPU, in one pass: gather, quantise, pack; or unpack,
// dequantise, scatter. The bytes are those of the torch codecs (pdtrim_deploy/kvcache/codecs), which tests hold this to
// bit for bit: so no fused multiply-add where both roundings count (-ffp-contract=off), and every reduction in float32.
// Vectors are the compiler's own, 16 lanes wide; intrinsics only where it has no word for an instruction.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
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

enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };
enum Wire : int32_t { kNative, kFp8, kInt8, kInt4 };

constexpr int kLanes = 16;
constexpr int kMaxDim = 1024;
constexpr int kGroup = 32;
constexpr float kFifteenth = float((1 + 0x1p-10) / 15);  // rounded up: no code of int4 overflows
constexpr uint16_t kHalfNaN = 0x7e00;
constexpr float kHalfMax = 65504.0f;
constexpr int64_t kAheadBytes = 1536;  // of scattered rows that are fetched before their turn
constexpr int64_t kBlockBytes = 1 << 16;    // of a pool: what a thread takes at a time
constexpr int64_t kThreadBytes = 1 << 20;   // less than this is not worth a thread
constexpr int64_t kStreamBytes = 8 << 20;   // more than this is written past the cache, as memcpy does

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

// --- float16 and bfloat16, nearest even -----------------------------------------------------------------------------

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

inline u16 to_half_below(f32 x) {  // the largest that is not above x
#if defined(__AVX512F__)
  return u16(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  const u16 half = to_half(x);
  const u32 bits = widen(half), next = (bits & 0x8000u) != 0 ? bits + 1u : bits - 1u;
  return __builtin_convertvector(from_half(half) > x ? next : bits, u16);
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

// --- values of a pool; of the last vector of a head only `lanes` are there, the others read as zero ------------------

template <Dtype dtype>
inline f32 load(const uint8_t* from, int lanes) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  uint8_t part[kLanes * item];
  if (lanes < kLanes) {
    memset(part, 0, sizeof(part));
    memcpy(part, from, lanes * item);
    from = part;
  }
  if constexpr (dtype == kFloat32) return get<f32>(from);
  if constexpr (dtype == kFloat16) return from_half(get<u16>(from));
  return bits_as<f32>(widen(get<u16>(from)) << 16);
}

template <Dtype dtype>
inline void store(uint8_t* to, f32 x, int lanes) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  uint8_t part[kLanes * item];
  uint8_t* const at = lanes < kLanes ? part : to;
  if constexpr (dtype == kFloat32) {
    set(at, x);
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

// --- int8 and fp8 ---------------------------------------------------------------------------------------------------

inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }

inline uint32_t largest_lane(u32 x) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = most > x[i] ? most : x[i];
  return most;
}

inline u8 int8_codes(f32 y) {  // |y| <= 127: added to 1.5 * 2^23, the nearest integer stands in the low bits
  return narrow(bits_as<u32>(y + 12582912.0f));
}

// |y| <= 448. Added to 1.5 * 2^20 times its own power of two, y loses all but 3 bits of mantissa (below 2^-6: all but
// steps of 2^-9); times 2^-120 its exponent is e4m3's.
inline u8 e4m3_codes(f32 y) {
  const u32 power = bits_as<u32>(y) & 0x7f800000u, least = u32{} + (121u << 23);
  const f32 magic = bits_as<f32>(larger(power, least) + ((20u << 23) + 0x400000u));
  const u32 bits = bits_as<u32>(((y + magic) - magic) * 0x1p-120f);
  return narrow(bits >> 20 | (bits_as<u32>(y) >> 24 & 0x80u));  // y's own sign: -0 is told from 0
}

// Several heads at a time, so that their chains of dependent steps overlap.
template <Dtype dtype, Wire wire, int kDim, int kHeads>
inline void encode_heads(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales) {
  constexpr int item = dtype == kFloat32 ? 4 : 2, kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  constexpr float steps = wire == kInt8 ? 127.0f : 448.0f;
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
      const u8 code = wire == kInt8 ? int8_codes(y) : e4m3_codes(y);
      store_codes(codes + h * dim + i, code, dim - i < kLanes ? dim - i : kLanes);
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

template <Dtype dtype, Wire wire, int kDim>
inline void decode_head(const uint8_t* codes, uint16_t scale, int dim, uint8_t* to) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  dim = kDim ? kDim : dim;
  const float by = from_half(scale) * (wire == kInt8 ? 1.0f : 256.0f);
#pragma GCC unroll 16
  for (int i = 0; i < dim; i += kLanes) {
    const int lanes = dim - i < kLanes ? dim - i : kLanes;
    const u8 code = load_codes(codes + i, lanes);
    f32 x;
    if constexpr (wire == kInt8) {
      x = to_float(widen(i8(code)));
    } else {  // sign, exponent and mantissa where float16 has them: the value / 256
      x = from_half(u16((widen_once(i8(code)) << 7) & int16_t(0xbfff)));
    }
    store<dtype>(to + i * item, x * by, lanes);
  }
}

// --- int4 -----------------------------------------------------------------------------------------------------------

template <int h>
inline f32 butterfly(f32 x) {  // lanes i and i ^ h become their sum and difference
  const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32 sign = bits_as<f32>(((lane & h) != 0 ? i32{} + int32_t(0x80000000) : i32{}) | 0x3f800000);
  return exact_fma(x, sign, __builtin_shuffle(x, lane ^ h));
}

// Sylvester's Hadamard matrix on blocks of `size` values, a power of two, by sums and differences in this order.
inline void rotate(f32* x, int vectors, int size) {
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) {
    if (size > 1) x[v] = butterfly<1>(x[v]);
    if (size > 2) x[v] = butterfly<2>(x[v]);
    if (size > 4) x[v] = butterfly<4>(x[v]);
    if (size > 8) x[v] = butterfly<8>(x[v]);
  }
#pragma GCC unroll 8
  for (int h = 1; h < size / kLanes; h *= 2) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      if (v & h) continue;
      const f32 a = x[v], b = x[v + h];
      x[v] = a + b, x[v + h] = a - b;
    }
  }
}


inline int log2_of(int size) { return __builtin_ctz(size); }
inline float half_to_the(int n) { return bits_as<float>(uint32_t(127 - n) << 23); }
inline int int4_group(int dim) { return (dim & -dim) < kGroup ? dim & -dim : kGroup; }

struct Steps {  // how the values of a group become codes: of four groups, each in a quarter of the lanes
  float low[kLanes], by[kLanes];
  u16 minimum, scale;
};

// From the least and the largest of a group before they are multiplied by `unit`, a power of two; `low` and `by` are
// for such values too. `broken` becomes NaN if minimum or scale is not finite.
inline Steps steps_of(f32 low, f32 high, float unit, f32& broken) {
  Steps steps;
  steps.minimum = to_half_below(low * unit + 0.0f);  // no -0, which a minimum keeps or not
  const f32 minimum = from_half(steps.minimum);
  steps.scale = to_half(larger(high * unit - minimum, f32{}) * kFifteenth + 0x1p-24f);
  const f32 scale = from_half(steps.scale);
  broken = exact_fma(minimum, f32{}, exact_fma(scale, f32{}, broken));
  set(steps.low, minimum * (1.0f / unit));
  set(steps.by, (1.0f / scale) * unit);
  return steps;
}

// In the low bits, 0 to 15: x is at least `low`.
inline u32 int4_codes(f32 x, float low, float by) { return bits_as<u32>((x - low) * by + 12582912.0f); }

// Quarter g of the result: quarters of the least (largest) of the 16 lanes of m[g].
template <f32 (*best)(f32, f32)>
inline f32 reduce_four(const f32 (&m)[4]) {
  const i32 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, even = {0, 1, 2, 3, 8, 9, 10, 11,
                                                                                   16, 17, 18, 19, 24, 25, 26, 27};
  const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32 a = best(__builtin_shuffle(m[0], m[1], low), __builtin_shuffle(m[0], m[1], low + 8));
  const f32 b = best(__builtin_shuffle(m[2], m[3], low), __builtin_shuffle(m[2], m[3], low + 8));
  const f32 c = best(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 4));
  const f32 d = best(c, __builtin_shuffle(c, lane ^ 2));
  return best(d, __builtin_shuffle(d, lane ^ 1));
}

// Whatever the vectors of a head, `group` of theirs at a time: for head sizes that 32 does not divide.
inline void encode_groups(const f32* x, int dim, float unit, uint8_t* codes, uint16_t* scales, uint16_t* minima, f32& broken) {
  const int group = int4_group(dim);
  float flat[kMaxDim];
  memcpy(flat, x, sizeof(float) * dim);
  for (int at = 0; at < dim; at += group, ++scales, ++minima) {
    float low = flat[at], high = low;
    for (int i = at + 1; i < at + group; ++i) low = flat[i] < low ? flat[i] : low, high = flat[i] > high ? flat[i] : high;
    const Steps steps = steps_of(all(low), all(high), unit, broken);
    *scales = steps.scale[0], *minima = steps.minimum[0];
    for (int i = at; i < at + group; ++i) {
      flat[i] = bits_as<float>(uint32_t(int4_codes(all(flat[i]), steps.low[0], steps.by[0])[0]));
    }
  }
  for (int i = 0; i < dim / 2; ++i) {
    codes[i] = uint8_t(bits_as<uint32_t>(flat[i]) + (bits_as<uint32_t>(flat[i + dim / 2]) << 4));
  }
}

template <Dtype dtype, int kDim, int kHeads>
inline void encode_int4(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales, uint16_t* minima) {
  constexpr int item = dtype == kFloat32 ? 4 : 2, kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  dim = kDim ? kDim : dim;
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, groups = dim / int4_group(dim);
  f32 x[kHeads][kVectors], broken{};
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int at = v * kLanes, lanes = dim - at < kLanes ? dim - at : kLanes;
      x[h][v] = load<dtype>(from + (h * dim + at) * item, lanes);
    }
    rotate(x[h], vectors, size);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) broken = exact_fma(x[h][v], f32{}, broken);  // NaN once a value is not finite
  }
  const float unit = half_to_the(log2_of(size) / 2);
  if (int4_group(dim) == kGroup) {  // a vector lies in one group; four groups at a time, of any heads
    Steps steps[(kHeads * kVectors + 7) / 8];
#pragma GCC unroll 2
    for (int four = 0; four * 4 < kHeads * groups; ++four) {
      f32 low[4], high[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int at = four * 4 + i, g = at < kHeads * groups ? at : kHeads * groups - 1;
        const f32 *const pair = &x[g / groups][g % groups * 2];
        low[i] = smaller(pair[0], pair[1]), high[i] = larger(pair[0], pair[1]);
      }
      steps[four] = steps_of(reduce_four<smaller>(low), reduce_four<larger>(high), unit, broken);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kHeads * groups; ++g) {
      scales[g] = steps[g / 4].scale[g % 4 * 4], minima[g] = steps[g / 4].minimum[g % 4 * 4];
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors / 2; ++v) {
        const int w = v + vectors / 2, g = h * groups + v / 2, k = h * groups + w / 2;
        const u32 first = int4_codes(x[h][v], steps[g / 4].low[g % 4 * 4], steps[g / 4].by[g % 4 * 4]);
        const u32 second = int4_codes(x[h][w], steps[k / 4].low[k % 4 * 4], steps[k / 4].by[k % 4 * 4]);
        set(codes + h * dim / 2 + v * kLanes, narrow(first + (second << 4)));
      }
    }
  } else {
    for (int h = 0; h < kHeads; ++h) {
      encode_groups(x[h], dim, unit, codes + h * dim / 2, scales + h * groups, minima + h * groups, broken);
    }
  }
  if (__builtin_expect(!all_zero(broken), 0)) {
    for (int h = 0; h < kHeads; ++h, scales += groups, minima += groups, codes += dim / 2) {
      bool bad = false;
      for (int v = 0; v < vectors; ++v) bad |= !all_zero(x[h][v] * 0.0f);
      for (int g = 0; g < groups; ++g) bad |= (scales[g] & 0x7c00) == 0x7c00 || (minima[g] & 0x7c00) == 0x7c00;
      if (!bad) continue;
      for (int g = 0; g < groups; ++g) scales[g] = minima[g] = kHalfNaN;
      memset(codes, 0, dim / 2);
    }
  }
}

template <Dtype dtype, int kDim>
inline void decode_int4(const uint8_t* codes, const uint16_t* scales, const uint16_t* minima, int dim, uint8_t* to) {
  constexpr int item = dtype == kFloat32 ? 4 : 2, kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  dim = kDim ? kDim : dim;
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = int4_group(dim), groups = dim / group;
  const float unit = half_to_the((log2_of(size) + 1) / 2);
  f32 x[kVectors];
  if (group == kGroup) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors / 2; ++v) {
      const i32 pair = widen(get<u8>(codes + v * kLanes));
      x[v] = to_float(pair & 15);
      x[v + vectors / 2] = to_float(pair >> 4);
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      const float scale = from_half(scales[g]), minimum = from_half(minima[g]);
      x[2 * g] = x[2 * g] * scale + minimum;
      x[2 * g + 1] = x[2 * g + 1] * scale + minimum;
    }
  } else {
    float flat[kVectors * kLanes] = {};
    for (int i = 0; i < dim; ++i) {
      const int code = i < dim / 2 ? codes[i] & 15 : codes[i - dim / 2] >> 4;
      flat[i] = float(code) * from_half(scales[i / group]) + from_half(minima[i / group]);
    }
    memcpy(x, flat, sizeof(f32) * vectors);
  }
  rotate(x, vectors, size);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    store<dtype>(to + v * kLanes * item, x[v] * unit, lanes < kLanes ? lanes : kLanes);
  }
}

// --- rows -----------------------------------------------------------------------------------------------------------

}  // namespace

extern "C" {

// One side (K or V) of one layer. Sections as in pdtrim_deploy/wire.py; those that a wire dtype lacks are not read.
struct PdtrimSide {
  uint8_t* pool;         // slot s begins at pool + s * stride
  const int64_t* slots;  // [rows]
  uint8_t* codes;
  uint16_t* scales;
  uint16_t* minima;
  int64_t stride;  // bytes
  int64_t pool_slots;
  int64_t rows;
  int64_t wire;
};

struct PdtrimShape {
  int32_t dtype, heads, dim;
};
}

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

// One row of one side, and where its parts stand in the sections.
template <Dtype dtype, Wire wire, int kDim, bool kPack>
struct Row {
  static constexpr int item = dtype == kFloat32 ? 4 : 2;
  uint8_t* values;
  uint8_t* codes;
  uint16_t* scales;
  uint16_t* minima;
  int dim, groups, heads;
  int64_t next;  // bytes to a row that comes soon, to be fetched; 0 when the processor does by itself

  template <int kHeads>
  void move() {  // kHeads heads at a time while there are so many, then fewer
    for (; heads >= kHeads; heads -= kHeads) {
      if (next) expect(values + next, kHeads * dim * item, !kPack);
      if constexpr (wire == kInt4 && kPack) {
        encode_int4<dtype, kDim, kHeads>(values, dim, codes, scales, minima);
      } else if constexpr (kPack) {
        encode_heads<dtype, wire, kDim, kHeads>(values, dim, codes, scales);
      } else {
        for (int h = 0; h < kHeads; ++h) {
          uint8_t* const to = values + h * dim * item;
          if constexpr (wire == kInt4) {
            const int at = h * groups;
            decode_int4<dtype, kDim>(codes + h * dim / 2, scales + at, minima + at, dim, to);
          } else {
            decode_head<dtype, wire, kDim>(codes + h * dim, scales[h], dim, to);
          }
        }
      }
      values += kHeads * dim * item, codes += kHeads * dim / (wire == kInt4 ? 2 : 1);
      scales += kHeads * groups, minima += kHeads * groups;
    }
    if constexpr (kHeads > 1) move<kHeads - 1>();
  }
};

template <Dtype dtype, Wire wire, int kDim, bool kPack>
void move_rows(const PdtrimSide& side, const PdtrimShape& shape, int64_t first, int64_t last, bool stream) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  const int dim = kDim ? kDim : shape.dim, heads = shape.heads;
  const int64_t row_bytes = int64_t{heads} * dim * item;
  const int groups = wire == kInt4 ? dim / int4_group(dim) : 1;
  const int64_t ahead = 1 + kAheadBytes / row_bytes;
  for (int64_t r = first; r < last; ++r) {
    uint8_t* const row = side.pool + side.slots[r] * side.stride;
    const int64_t step = r + ahead < last ? side.slots[r + ahead] - side.slots[r] : ahead;
    const int64_t next = step == ahead ? 0 : step * side.stride;
    if constexpr (wire == kNative) {
      uint8_t* const packed = side.codes + r * row_bytes;
      if (next) expect(row + next, row_bytes, !kPack);
      kPack ? copy_row(packed, row, row_bytes, stream) : copy_row(row, packed, row_bytes, stream);
    } else {
      const int64_t at = r * heads;
      uint8_t* const codes = side.codes + at * dim / (wire == kInt4 ? 2 : 1);
      Row<dtype, wire, kDim, kPack>{row, codes, side.scales + at * groups, side.minima + at * groups, dim, groups, heads, next}
          .template move<kDim == 128 ? 2 : kDim == 64 ? 4 : 1>();
    }
  }
}

using Move = void (*)(const PdtrimSide&, const PdtrimShape&, int64_t, int64_t, bool);

template <bool kPack, Dtype dtype, int kDim>
Move move_of(int64_t wire) {
  static const Move moves[] = {move_rows<dtype, kNative, kDim, kPack>, move_rows<dtype, kFp8, kDim, kPack>,
                               move_rows<dtype, kInt8, kDim, kPack>, move_rows<dtype, kInt4, kDim, kPack>};
  return moves[wire];
}

template <bool kPack, Dtype dtype>
Move move_of(int64_t wire, int32_t dim) {
  return dim == 128 ? move_of<kPack, dtype, 128>(wire)
                    : dim == 64 ? move_of<kPack, dtype, 64>(wire) : move_of<kPack, dtype, 0>(wire);
}

template <bool kPack>
Move move_of(int64_t wire, const PdtrimShape& shape) {
  return shape.dtype == kFloat32   ? move_of<kPack, kFloat32>(wire, shape.dim)
         : shape.dtype == kFloat16 ? move_of<kPack, kFloat16>(wire, shape.dim)
                                   : move_of<kPack, kBFloat16>(wire, shape.dim);
}

}  // namespace

// Moves all rows of `count` sides. Returns 0; 1 when a slot lies outside its pool, and then nothing was moved.
extern "C" int pdtrim_move(const PdtrimSide* sides, int64_t count, const PdtrimShape* shape, int32_t threads, int32_t pack) {
  const int64_t row_bytes = int64_t{shape->heads} * shape->dim * (shape->dtype == kFloat32 ? 4 : 2);
  const int64_t step = kBlockBytes / row_bytes + 1;
  std::vector<int64_t> starts(count + 1, 0);  // of each side's blocks among all blocks
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t most = 0;
    for (int64_t r = 0; r < sides[i].rows; ++r) {
      const uint64_t slot = uint64_t(sides[i].slots[r]);
      most = most > slot ? most : slot;
    }
    if (sides[i].rows && most >= uint64_t(sides[i].pool_slots)) return 1;
    starts[i + 1] = starts[i] + (sides[i].rows + step - 1) / step;
    total += sides[i].rows * row_bytes;
  }
  const bool stream = total >= kStreamBytes;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    int64_t i = 0;
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < starts[count];) {
      while (block >= starts[i + 1]) ++i;
      const PdtrimSide& side = sides[i];
      const int64_t first = (block - starts[i]) * step, last = first + step < side.rows ? first + step : side.rows;
      (pack ? move_of<true>(side.wire, *shape) : move_of<false>(side.wire, *shape))(side, *shape, first, last, stream);
    }
#if defined(__AVX512F__)
    _mm_sfence();
#endif
  };
  const int64_t useful = total / kThreadBytes;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads && i < useful; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return 0;
}
