// Runs a CUDA kernel's source on the host: what sparse_kv_send.cu takes from CUDA, in plain C++ (POSIX ucontext).
// A warp's 32 lanes are coroutines on one thread; a shuffle hands over to the next lane, so lanes that shuffle together
// meet there, as they do on a GPU. Warps, blocks and the grid are loops. For tests: numerics and indices, not speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __launch_bounds__(...)

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline int cudaPeekAtLastError() { return cudaSuccess; }

using cudaStream_t = void*;
enum cudaMemcpyKind : int { cudaMemcpyDeviceToDevice = 3 };
inline int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  uint32_t x, y, z;
  explicit dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace pdtrim {
namespace host {

constexpr uint32_t kLanes = 32;
constexpr size_t kStack = 64 * 1024;

struct Warp {
  ucontext_t scheduler, lanes[kLanes];
  std::vector<char> stacks = std::vector<char>(kLanes * kStack);
  std::function<void()> body;
  uint32_t values[kLanes][2];  // two deep: a lane may reach its next shuffle before the others have read this one's value
  uint32_t shuffles[kLanes];
  bool done[kLanes];
  uint32_t lane = 0;
};

inline thread_local Warp* warp = nullptr;

inline void run_lane() {
  warp->body();
  warp->done[warp->lane] = true;
}

inline void prepare(Warp& state, uint32_t lane) {
  getcontext(&state.lanes[lane]);
  state.lanes[lane].uc_stack.ss_sp = state.stacks.data() + lane * kStack;
  state.lanes[lane].uc_stack.ss_size = kStack;
  state.lanes[lane].uc_link = &state.scheduler;
  makecontext(&state.lanes[lane], run_lane, 0);
  state.shuffles[lane] = 0;
  state.done[lane] = false;
}

inline void launch(dim3 grid, dim3 block, void* /* stream */, const std::function<void()>& body) {
  Warp state;
  state.body = body;
  warp = &state;
  gridDim = grid, blockDim = block;
  for (uint32_t b = 0; b < grid.x; ++b) {
    for (uint32_t w = 0; w < block.y; ++w) {  // blocks are (32, warps)
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        prepare(state, lane);
      }
      for (bool running = true; running;) {
        running = false;
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
          if (state.done[lane]) continue;
          state.lane = lane;
          blockIdx = dim3(b, 0, 0), threadIdx = dim3(lane, w, 0);
          swapcontext(&state.scheduler, &state.lanes[lane]);
          running = running || !state.done[lane];
        }
      }
    }
  }
  warp = nullptr;
}

}  // namespace host
}  // namespace pdtrim

// The lane that it names must be in `mask` and take part; width is a power of two.
inline uint32_t __shfl_xor_sync(uint32_t /* mask */, uint32_t value, int other, int /* width */) {
  using pdtrim::host::warp;
  const uint32_t lane = warp->lane, slot = warp->shuffles[lane]++ % 2;
  warp->values[lane][slot] = value;
  swapcontext(&warp->lanes[lane], &warp->scheduler);
  return warp->values[lane ^ uint32_t(other)][slot];
}
