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
#if defined(__F16C__)
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
constexpr int kAhead = 2;  // rows
constexpr uint16_t kHalfNaN = 0x7e00;
constexpr float kHalfMax = 65504.0f;
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

// Integers between 8 and 32 bits; the compiler's own conversion goes through scalars.
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
  const u32 wide = __builtin_convertvector(half, u32), magnitude = (wide & 0x7fffu) << 13;
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
  return bits_as<f32>(__builtin_convertvector(get<u16>(from), u32) << 16);
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

inline u8 e4m3_codes(f32 y) {  // |y| <= 448
  const u32 bits = bits_as<u32>(y), magnitude = bits & 0x7fffffffu;
  const u32 normal = (magnitude + (0x7ffffu - (120u << 23)) + ((magnitude >> 20) & 1u)) >> 20;
  const u32 small = bits_as<u32>(bits_as<f32>(magnitude) + 16384.0f);  // below 2^-6 a code counts steps of 2^-9
  const u32 code = magnitude < (121u << 23) ? small & 0xfu : normal;
  return narrow(code | (bits >> 24 & 0x80u));
}

template <Dtype dtype, Wire wire, int kDim>
inline void encode_head(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scale) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  constexpr float steps = wire == kInt8 ? 127.0f : 448.0f;
  dim = kDim ? kDim : dim;
  f32 x[(kDim ? kDim : kMaxDim) / kLanes];
  u32 most{};
#pragma GCC unroll 16
  for (int i = 0, v = 0; i < dim; i += kLanes, ++v) {
    x[v] = load<dtype>(from + i * item, dim - i < kLanes ? dim - i : kLanes);
    most = larger(most, bits_as<u32>(x[v]) & 0x7fffffffu);
  }
  const uint32_t magnitude = largest_lane(most);
  if (magnitude >= 0x7f800000u) {
    *scale = kHalfNaN;
    memset(codes, 0, dim);
    return;
  }
  const float wanted = bits_as<float>(magnitude) * (1.0f / steps);
  *scale = to_half(wanted < kHalfMax ? wanted : kHalfMax);
  const float by = *scale ? 1.0f / from_half(*scale) : 0.0f;
#pragma GCC unroll 16
  for (int i = 0, v = 0; i < dim; i += kLanes, ++v) {
    const f32 y = larger(smaller(x[v] * by, all(steps)), all(-steps));
    store_codes(codes + i, wire == kInt8 ? int8_codes(y) : e4m3_codes(y), dim - i < kLanes ? dim - i : kLanes);
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

struct Steps {  // how the values of a group become codes
  f32 low, by;
  u16 minimum, scale;
};

inline Steps steps_of(f32 low, f32 high) {
  Steps steps;
  steps.minimum = to_half(low + 0.0f);  // no -0, which a minimum keeps or not
  steps.low = from_half(steps.minimum);
  steps.scale = to_half(larger(high - steps.low, f32{}) * kFifteenth + 0x1p-24f);
  steps.by = 1.0f / from_half(steps.scale);
  return steps;
}

inline bool finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

inline u32 int4_codes(f32 x, f32 low, f32 by) { return bits_as<u32>(larger((x - low) * by, f32{}) + 12582912.0f); }

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

template <int quarter>
inline f32 spread(f32 x) {
  return __builtin_shuffle(x, i32{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3} + 4 * quarter);
}

inline f32 spread(f32 x, int quarter) {
  return quarter == 0 ? spread<0>(x) : quarter == 1 ? spread<1>(x) : quarter == 2 ? spread<2>(x) : spread<3>(x);
}

template <Dtype dtype, int kDim>
inline void encode_int4(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales, uint16_t* minima) {
  constexpr int item = dtype == kFloat32 ? 4 : 2, kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  dim = kDim ? kDim : dim;
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = int4_group(dim), groups = dim / group;
  f32 x[kVectors], broken{};
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    x[v] = load<dtype>(from + v * kLanes * item, lanes < kLanes ? lanes : kLanes);
  }
  rotate(x, vectors, size);
  const float unit = half_to_the(log2_of(size) / 2);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    x[v] = x[v] * unit;
    broken = exact_fma(x[v], f32{}, broken);  // NaN once a value is not finite
  }
  bool bad = !all_zero(broken);
  if (group == kGroup) {  // each vector lies in one group
    Steps steps[(kVectors + 7) / 8];
#pragma GCC unroll 2
    for (int four = 0; four * 4 < groups; ++four) {
      f32 low[4], high[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int g = four * 4 + i < groups ? four * 4 + i : groups - 1;
        low[i] = smaller(x[2 * g], x[2 * g + 1]), high[i] = larger(x[2 * g], x[2 * g + 1]);
      }
      steps[four] = steps_of(reduce_four<smaller>(low), reduce_four<larger>(high));
    }
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      scales[g] = steps[g / 4].scale[g % 4 * 4], minima[g] = steps[g / 4].minimum[g % 4 * 4];
      bad |= !finite_half(scales[g]) || !finite_half(minima[g]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors / 2; ++v) {
      const int w = v + vectors / 2;
      const Steps &a = steps[v / 8], &b = steps[w / 8];
      const u32 first = int4_codes(x[v], spread(a.low, v / 2 % 4), spread(a.by, v / 2 % 4));
      const u32 second = int4_codes(x[w], spread(b.low, w / 2 % 4), spread(b.by, w / 2 % 4));
      set(codes + v * kLanes, narrow(first + (second << 4)));
    }
  } else {
    float flat[kVectors * kLanes];
    memcpy(flat, x, sizeof(f32) * vectors);
    for (int g = 0; g < groups; ++g) {
      float low = flat[g * group], high = low;
      for (int i = 1; i < group; ++i) {
        const float one = flat[g * group + i];
        low = one < low ? one : low, high = one > high ? one : high;
      }
      const Steps steps = steps_of(all(low), all(high));
      scales[g] = steps.scale[0], minima[g] = steps.minimum[0];
      bad |= !finite_half(scales[g]) || !finite_half(minima[g]);
      for (int i = g * group; i < (g + 1) * group; ++i) {
        flat[i] = bits_as<float>(int4_codes(all(flat[i]), steps.low, steps.by)[0]);
      }
    }
    for (int i = 0; i < dim / 2; ++i) {
      codes[i] = uint8_t(bits_as<uint32_t>(flat[i]) + (bits_as<uint32_t>(flat[i + dim / 2]) << 4));
    }
  }
  if (bad) {
    for (int g = 0; g < groups; ++g) scales[g] = minima[g] = kHalfNaN;
    memset(codes, 0, dim / 2);
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

inline void expect(const uint8_t* row, int64_t bytes, bool written) {
  for (int64_t i = 0; i < bytes; i += 64) written ? __builtin_prefetch(row + i, 1) : __builtin_prefetch(row + i, 0);
}

template <Dtype dtype, Wire wire, int kDim, bool kPack>
void move_rows(const PdtrimSide& side, const PdtrimShape& shape, int64_t first, int64_t last, bool stream) {
  constexpr int item = dtype == kFloat32 ? 4 : 2;
  const int dim = kDim ? kDim : shape.dim, heads = shape.heads;
  const int64_t row_bytes = int64_t{heads} * dim * item;
  const int groups = wire == kInt4 ? dim / int4_group(dim) : 1;
  for (int64_t r = first; r < last; ++r) {
    uint8_t* const row = side.pool + side.slots[r] * side.stride;
    if (r + kAhead < last && side.slots[r + kAhead] != side.slots[r + kAhead - 1] + 1) {
      expect(side.pool + side.slots[r + kAhead] * side.stride, row_bytes, !kPack);
    }
    if constexpr (wire == kNative) {
      uint8_t* const packed = side.codes + r * row_bytes;
      kPack ? copy_row(packed, row, row_bytes, stream) : copy_row(row, packed, row_bytes, stream);
      continue;
    }
    for (int h = 0; h < heads; ++h) {
      const int64_t at = r * heads + h;
      uint8_t* const values = row + h * dim * item;
      uint8_t* const codes = side.codes + (wire == kInt4 ? at * dim / 2 : at * dim);
      uint16_t* const scales = side.scales + at * groups;
      if constexpr (wire == kInt4) {
        uint16_t* const minima = side.minima + at * groups;
        if constexpr (kPack) {
          encode_int4<dtype, kDim>(values, dim, codes, scales, minima);
        } else {
          decode_int4<dtype, kDim>(codes, scales, minima, dim, values);
        }
      } else if constexpr (wire != kNative) {
        if constexpr (kPack) {
          encode_head<dtype, wire, kDim>(values, dim, codes, scales);
        } else {
          decode_head<dtype, wire, kDim>(codes, *scales, dim, values);
        }
      }
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
