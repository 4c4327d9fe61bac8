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

enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kE4m3, kE5m2 };
constexpr int item_of(Dtype dtype) { return dtype == kFloat32 ? 4 : dtype == kE4m3 || dtype == kE5m2 ? 1 : 2; }  // bytes
enum Code : int32_t { kNative, kFp8, kInt8, kInt4, kInt3 };
constexpr bool is_rotated(Code code) { return code == kInt4 || code == kInt3; }
constexpr int code_bytes(Code code, int dim) {  // of one head
  return code == kInt4 ? dim / 2 : code == kInt3 ? dim * 3 / 8 : dim;
}

constexpr int kLanes = 16;
constexpr int kMaxDim = 1024;
constexpr int kGroup = 64;
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

// --- fp8, nearest even, saturated; NaN is 0x7f ------------------------------------------------------------------------

inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }

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

// --- values of a pool; of the last vector of a head only `lanes` are there, the others read as zero ------------------

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

// --- int8 and fp8 ---------------------------------------------------------------------------------------------------

inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline uint32_t largest_lane(u32 x) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = most > x[i] ? most : x[i];
  return most;
}

inline u8 int8_codes(f32 y) {  // |y| <= 127: added to 1.5 * 2^23, the nearest integer stands in the low bits
  return narrow(bits_as<u32>(y + 12582912.0f));
}

// Several heads at a time, so that their chains of dependent steps overlap.
template <Dtype dtype, Code code, int kDim, int kHeads>
inline void encode_heads(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype), kVectors = (kDim ? kDim : kMaxDim) / kLanes;
  constexpr float steps = code == kInt8 ? 127.0f : 448.0f;
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
      const u8 bytes = code == kInt8 ? int8_codes(y) : e4m3_codes(y);
      store_codes(codes + h * dim + i, bytes, dim - i < kLanes ? dim - i : kLanes);
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

template <Dtype dtype, Code code, int kDim>
inline void decode_head(const uint8_t* codes, uint16_t scale, int dim, uint8_t* to) {
  constexpr int item = item_of(dtype);
  dim = kDim ? kDim : dim;
  const float by = from_half(scale) * (code == kInt8 ? 1.0f : 256.0f);
#pragma GCC unroll 16
  for (int i = 0; i < dim; i += kLanes) {
    const int lanes = dim - i < kLanes ? dim - i : kLanes;
    const u8 bytes = load_codes(codes + i, lanes);
    f32 x;
    if constexpr (code == kInt8) {
      x = to_float(widen(i8(bytes)));
    } else {  // sign, exponent and mantissa where float16 has them: the value / 256
      x = from_half(u16((widen_once(i8(bytes)) << 7) & int16_t(0xbfff)));
    }
    store<dtype>(to + i * item, x * by, lanes);
  }
}

// --- int4 and int3 --------------------------------------------------------------------------------------------------

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
inline int rotated_group(int dim) { return (dim & -dim) < kGroup ? dim & -dim : kGroup; }

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

// Quarter g of the result: quarters of the largest of the 16 lanes of m[g].
inline u32 reduce_four(const u32 (&m)[4]) {
  const u32 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const u32 even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const u32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const u32 a = larger(__builtin_shuffle(m[0], m[1], low), __builtin_shuffle(m[0], m[1], low + 8));
  const u32 b = larger(__builtin_shuffle(m[2], m[3], low), __builtin_shuffle(m[2], m[3], low + 8));
  const u32 c = larger(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 4));
  const u32 d = larger(c, __builtin_shuffle(c, lane ^ 2));
  return larger(d, __builtin_shuffle(d, lane ^ 1));
}

// Heads with a scale that is not finite: all their scales become NaN, their codes 0.
inline void mark_broken(int heads, int bytes, int groups, uint8_t* codes, uint16_t* scales) {
  for (int h = 0; h < heads; ++h, scales += groups, codes += bytes) {
    bool bad = false;
    for (int g = 0; g < groups; ++g) bad |= (scales[g] & 0x7c00) == 0x7c00;
    if (!bad) continue;
    for (int g = 0; g < groups; ++g) scales[g] = kHalfNaN;
    memset(codes, 0, bytes);
  }
}

// Several heads of 64 or 128 channels, one scale for four vectors; up to four groups.
template <Dtype dtype, Code code, int kDim, int kHeads>
inline void encode_rotated(const uint8_t* from, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype), kVectors = kDim / kLanes, kGroups = kDim / kGroup * kHeads;
  constexpr int kBytes = code_bytes(code, kDim);
  const float unit = half_to_the(log2_of(kDim) / 2);
  f32 x[kHeads][kVectors], broken{};
  u32 most[kGroups];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += 2) load_pair<dtype>(from + (h * kDim + v * kLanes) * item, x[h][v], x[h][v + 1]);
    rotate_pairs<kDim>(x[h]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const f32* const group = &x[0][0] + g * 4;
    u32 bits[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bits[i] = bits_as<u32>(group[i]) & 0x7fffffffu;
    most[g] = larger(larger(bits[0], bits[1]), larger(bits[2], bits[3]));  // NaN is the largest
  }
  static_assert(kGroups <= 4, "one reduction");
  constexpr int last = kGroups - 1;
  const u32 four = reduce_four({most[0], most[last < 1 ? last : 1], most[last < 2 ? last : 2], most[last]});
  const Steps steps = steps_of<code>(four, unit, broken);
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) scales[g] = steps.scale[g * 4];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors / 2; v += 2) {
      const int w = v + kVectors / 2;
      const float first = steps.by[(h * kVectors + v) / 4 * 4], second = steps.by[(h * kVectors + w) / 4 * 4];
      store_four<code, kDim>(codes + h * kBytes, v * kLanes, codes_of<code>(x[h][v], first),
                             codes_of<code>(x[h][v + 1], first), codes_of<code>(x[h][w], second),
                             codes_of<code>(x[h][w + 1], second));
    }
  }
  if (__builtin_expect(!all_zero(broken), 0)) mark_broken(kHeads, kBytes, kDim / kGroup, codes, scales);
}

template <Dtype dtype, Code code, int kDim>
inline void decode_rotated(const uint8_t* codes, const uint16_t* scales, uint8_t* to) {
  constexpr int item = item_of(dtype), kVectors = kDim / kLanes;
  const float unit = half_to_the((log2_of(kDim) + 1) / 2);
  f32 x[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors / 2; v += 2) {
    const int w = v + kVectors / 2;
    const float first = from_half(scales[v / 4]), second = from_half(scales[w / 4]);
    const Four four = load_four<code, kDim>(codes, v * kLanes);
    x[v] = levels_of<code>(four.even) * first, x[v + 1] = levels_of<code>(four.odd) * first;
    x[w] = levels_of<code>(four.even_above) * second, x[w + 1] = levels_of<code>(four.odd_above) * second;
  }
  rotate_pairs<kDim>(x);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; v += 2) store_pair<dtype>(to + v * kLanes * item, x[v] * unit, x[v + 1] * unit);
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

// One head of any size.
template <Dtype dtype, Code code>
void encode_rotated(const uint8_t* from, int dim, uint8_t* codes, uint16_t* scales) {
  constexpr int item = item_of(dtype);
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = rotated_group(dim);
  const float unit = half_to_the(log2_of(size) / 2);
  f32 x[kMaxDim / kLanes], broken{};
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    x[v] = load<dtype>(from + v * kLanes * item, lanes < kLanes ? lanes : kLanes);
  }
  rotate(x, vectors, size);
  uint32_t flat[kMaxDim];
  memcpy(flat, x, sizeof(float) * dim);
  for (int at = 0, g = 0; at < dim; at += group, ++g) {
    uint32_t most = 0;
    for (int i = at; i < at + group; ++i) most = larger(flat[i] & 0x7fffffffu, most);
    const Steps steps = steps_of<code>(u32{} + most, unit, broken);
    scales[g] = steps.scale[0];
    for (int i = at; i < at + group; ++i) {
      const float y = bits_as<float>(flat[i]) * steps.by[0];
      flat[i] = uint32_t(int32_t(y * (Grid<code>::curve - std::fabs(y)) + Grid<code>::half));
    }
  }
  memset(codes, 0, code_bytes(code, dim));
  for (int i = 0; i < dim; ++i) store_code<code>(codes, i, dim, flat[i]);
  if (!all_zero(broken)) mark_broken(1, code_bytes(code, dim), dim / group, codes, scales);
}

template <Dtype dtype, Code code>
void decode_rotated(const uint8_t* codes, const uint16_t* scales, int dim, uint8_t* to) {
  constexpr int item = item_of(dtype);
  const int vectors = (dim + kLanes - 1) / kLanes, size = dim & -dim, group = rotated_group(dim);
  const float unit = half_to_the((log2_of(size) + 1) / 2);
  float flat[kMaxDim] = {};
  for (int at = 0; at < dim; at += group) {
    const float scale = from_half(scales[at / group]);
    for (int i = at; i < at + group; ++i) {
      flat[i] = Grid<code>::levels[load_code<code>(codes, i, dim)] * scale;
    }
  }
  f32 x[kMaxDim / kLanes];
  memcpy(x, flat, sizeof(f32) * vectors);
  rotate(x, vectors, size);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = dim - v * kLanes;
    store<dtype>(to + v * kLanes * item, x[v] * unit, lanes < kLanes ? lanes : kLanes);
  }
}

// --- rows -----------------------------------------------------------------------------------------------------------

}  // namespace

extern "C" {

struct PdtrimRun {  // pdtrim_deploy/kvcache/table.py
  int64_t pool, mean, stride, pool_slots, group, token, position, rows, code, codes, scales;
};

struct PdtrimChunk {
  const int64_t* slots;  // [groups, tokens]
  uint8_t* packed;
  const float* turns;  // [positions, dim]: cosines, then sines; null when all rows travel whole
  int32_t dtype, heads, dim;
  int64_t group_stride;  // between rows of slots

  const int64_t* slots_of(const PdtrimRun& run) const { return slots + run.group * group_stride + run.token; }
};
}

namespace {

// A run's own pointers.
struct Part {
  uint8_t* pool;         // slot s begins at pool + s * stride
  const int64_t* slots;  // [rows]
  uint8_t* codes;
  uint16_t* scales;    // native rows have none
  const float* mean;   // [heads, dim]: what rows travel less, before it is turned; null when they travel whole
  const float* turns;  // of the first row; the next row's follows
  int64_t stride;      // bytes

  Part(const PdtrimRun& run, const PdtrimChunk& chunk)
      : pool(reinterpret_cast<uint8_t*>(run.pool)),
        slots(chunk.slots_of(run)),
        codes(chunk.packed + run.codes),
        scales(reinterpret_cast<uint16_t*>(chunk.packed + run.scales)),
        mean(reinterpret_cast<const float*>(run.mean)),
        turns(mean ? chunk.turns + run.position * chunk.dim : nullptr),
        stride(run.stride) {}
};

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
  const float *mean, *turn;  // null when there is no offset

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
        store<kFloat32>(reinterpret_cast<uint8_t*>(at),
                        load<dtype>(values + (h * dim + i) * item, lanes) - load<kFloat32>(offset, lanes), lanes);
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
      const f32 whole = load<kFloat32>(reinterpret_cast<const uint8_t*>(plain + i), lanes) +
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
      scales += kHeads * groups, mean += mean ? kHeads * dim : 0;
    }
    if constexpr (kHeads > 1) move<kHeads - 1>();
  }
};

template <Dtype dtype, Code code, int kDim, bool kPack>
void move_rows(const Part& part, const PdtrimChunk& shape, int64_t first, int64_t last, bool stream) {
  constexpr int item = item_of(dtype);
  const int dim = kDim ? kDim : shape.dim, heads = shape.heads;
  const int64_t row_bytes = int64_t{heads} * dim * item;
  const int groups = is_rotated(code) ? dim / rotated_group(dim) : 1;
  const int64_t ahead = 1 + kAheadBytes / row_bytes;
  for (int64_t r = first; r < last; ++r) {
    uint8_t* const row = part.pool + part.slots[r] * part.stride;
    const int64_t step = r + ahead < last ? part.slots[r + ahead] - part.slots[r] : ahead;
    const int64_t next = step == ahead ? 0 : step * part.stride;
    if constexpr (code == kNative) {
      uint8_t* const packed = part.codes + r * row_bytes;
      if (next) expect(row + next, row_bytes, !kPack);
      kPack ? copy_row(packed, row, row_bytes, stream) : copy_row(row, packed, row_bytes, stream);
    } else {
      const int64_t at = r * heads;
      uint8_t* const codes = part.codes + at * code_bytes(code, dim);
      const float* const turn = part.mean ? part.turns + r * dim : nullptr;
      Row<dtype, code, kDim, kPack>{row, codes, part.scales + at * groups, dim, groups, heads, next, part.mean, turn}
          .template move<kDim == 128 ? 2 : kDim == 64 ? 4 : 1>();
    }
  }
}

using Move = void (*)(const Part&, const PdtrimChunk&, int64_t, int64_t, bool);

template <bool kPack, Dtype dtype, int kDim>
Move move_of(int64_t code) {
  static const Move moves[] = {move_rows<dtype, kNative, kDim, kPack>, move_rows<dtype, kFp8, kDim, kPack>,
                               move_rows<dtype, kInt8, kDim, kPack>, move_rows<dtype, kInt4, kDim, kPack>,
                               move_rows<dtype, kInt3, kDim, kPack>};
  return moves[code];
}

template <bool kPack, Dtype dtype>
Move move_of(int64_t code, int32_t dim) {
  return dim == 128 ? move_of<kPack, dtype, 128>(code)
                    : dim == 64 ? move_of<kPack, dtype, 64>(code) : move_of<kPack, dtype, 0>(code);
}

template <bool kPack>
Move move_of(int64_t code, const PdtrimChunk& shape) {
  return shape.dtype == kFloat32   ? move_of<kPack, kFloat32>(code, shape.dim)
         : shape.dtype == kFloat16 ? move_of<kPack, kFloat16>(code, shape.dim)
         : shape.dtype == kE4m3    ? move_of<kPack, kE4m3>(code, shape.dim)
         : shape.dtype == kE5m2    ? move_of<kPack, kE5m2>(code, shape.dim)
                                   : move_of<kPack, kBFloat16>(code, shape.dim);
}

}  // namespace

// Moves all rows of `count` runs. Returns 0; 1 when a slot lies outside its pool, and then nothing was moved.
extern "C" int pdtrim_move(const PdtrimRun* runs, int64_t count, const PdtrimChunk* chunk, int32_t threads, int32_t pack) {
  const int64_t row_bytes = int64_t{chunk->heads} * chunk->dim * item_of(Dtype(chunk->dtype));
  const int64_t step = kBlockBytes / row_bytes + 1;
  std::vector<int64_t> starts(count + 1, 0);  // of each run's blocks among all blocks
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t most = 0;
    const int64_t* const slots = chunk->slots_of(runs[i]);
    for (int64_t r = 0; r < runs[i].rows; ++r) {
      const uint64_t slot = uint64_t(slots[r]);
      most = most > slot ? most : slot;
    }
    if (most >= uint64_t(runs[i].pool_slots)) return 1;
    starts[i + 1] = starts[i] + (runs[i].rows + step - 1) / step;
    total += runs[i].rows * row_bytes;
  }
  const bool stream = total >= kStreamBytes;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    int64_t i = 0;
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < starts[count];) {
      while (block >= starts[i + 1]) ++i;
      const PdtrimRun& run = runs[i];
      const int64_t first = (block - starts[i]) * step, last = first + step < run.rows ? first + step : run.rows;
      const Move move = pack ? move_of<true>(run.code, *chunk) : move_of<false>(run.code, *chunk);
      move(Part(run, *chunk), *chunk, first, last, stream);
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
