// Moves rows of KV between a paged pool and packed sections on a CPU, in one pass: gather, quantise, pack; or unpack,
// dequantise, scatter. The bytes are those of the torch codecs (pdtrim_deploy/kvcache/codecs), which tests hold this to
// bit for bit: so no fused multiply-add where both roundings count (-ffp-contract=off), and every reduction in float32.
#include <atomic>
#include <thread>
#include <vector>

#include "row.h"

namespace {

constexpr int64_t kAheadBytes = 1536;  // of scattered rows that are fetched before their turn
constexpr int64_t kBlockBytes = 1 << 16;    // of a pool: what a thread takes at a time
constexpr int64_t kThreadBytes = 1 << 20;   // less than this is not worth a thread
constexpr int64_t kStreamBytes = 8 << 20;   // more than this is written past the cache, as memcpy does

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
      const float* const factor = part.mean ? part.mean + int64_t{kPack ? 1 : 2} * shape.heads * dim : nullptr;
      const float* const turn = part.mean ? part.turns + r * dim : nullptr;
      Row<dtype, code, kDim, kPack>{row, codes, part.scales + at * groups, dim, groups, heads, next, part.mean, factor, turn}
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
