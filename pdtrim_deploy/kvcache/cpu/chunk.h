// A chunk as Python gives it (pdtrim_deploy/kvcache/table.py), and one run of it.
#pragma once

#include <cstdint>

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
  const float* mean;   // [3, heads, dim]: what rows travel less, before it is turned, then scales and their inverses;
                       // null when they travel whole
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

}  // namespace
