// The kernels of sparse_kv_send.h. nvcc compiles this file for GPUs; a C++ compiler compiles it, unchanged, for the
// host through host_launch.h, which is how its numerics are tested where there is no GPU.
#include "sparse_kv_send.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define PDTRIM_LAUNCH(kernel, grid, block, stream, argument) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(argument)
#else
#include "host_launch.h"
#define PDTRIM_LAUNCH(kernel, grid, block, stream, argument) \
  pdtrim::host::launch(grid, block, stream, [&] { kernel(argument); })
#endif

namespace pdtrim {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarpsPerBlock = 8;
constexpr int32_t kBlocksPerSM = 4;   // at most 64 registers; left to itself ptxas spills to fit six
constexpr int32_t kMaxBlocks = 4096;  // the loops stride over the grid: a cap costs nothing
constexpr int32_t kLanesPerHead = 4;  // lanes that share one head of one row when quantising
constexpr int32_t kStep = 16;         // values that a lane quantises at a time: 16 codes are one 16-byte store

struct Args {
  const uint8_t* k;
  const uint8_t* v;
  const void* rows;
  uint8_t* to;  // the layer's first byte
  Layout layout;
  bool wide;  // rows are int64, else int32
};

PDTRIM_BOTH int64_t slot_of(const Args& args, int64_t row) {
  return args.wide ? static_cast<const int64_t*>(args.rows)[row] : static_cast<const int32_t*>(args.rows)[row];
}

PDTRIM_BOTH bool aligned(const void* pointer, uint32_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// A warp per row of K or of V: 16-byte copies, and a scalar tail for what alignment or row size leaves over.
template <typename Item>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock, kBlocksPerSM) copy_rows(const Args args) {
  const Layout& layout = args.layout;
  const int64_t items = layout.width();
  for (int64_t pair = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; pair < 2 * layout.rows;
       pair += int64_t{gridDim.x} * blockDim.y) {
    const int32_t side = pair >= layout.rows;
    const int64_t row = pair - side * layout.rows;
    const Item* __restrict__ from = reinterpret_cast<const Item*>(
        (side ? args.v : args.k) + layout.source(slot_of(args, row), 0));
    Item* __restrict__ to = reinterpret_cast<Item*>(args.to + layout.codes(side, row, 0));
    int64_t done = 0;
    if (aligned(from, 16) && aligned(to, 16)) {
      const int64_t vectors = items * int64_t{sizeof(Item)} / 16;
      for (int64_t i = threadIdx.x; i < vectors; i += kWarp) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
      done = vectors * (16 / int64_t{sizeof(Item)});
    }
    for (int64_t i = done + threadIdx.x; i < items; i += kWarp) to[i] = from[i];
  }
}

PDTRIM_BOTH void split(uint32_t word, float* values, bool half) {
  values[0] = half ? from_half(uint16_t(word)) : from_bfloat(uint16_t(word));
  values[1] = half ? from_half(uint16_t(word >> 16)) : from_bfloat(uint16_t(word >> 16));
}

// kStep values from `first` on, as float32; 16 bytes a load where `from` is so aligned.
template <int32_t dtype>
PDTRIM_BOTH void load_step(const uint8_t* from, int32_t first, float (&values)[kStep]) {
  constexpr int32_t item = dtype == kFloat32 ? 4 : 2, per_vector = 16 / item;
  if (!aligned(from, 16)) {
#pragma unroll
    for (int32_t i = 0; i < kStep; ++i) values[i] = load<dtype>(from, first + i);
    return;
  }
#pragma unroll
  for (int32_t i = 0; i < kStep; i += per_vector) {
    const uint4 vector = *reinterpret_cast<const uint4*>(from + (first + i) * item);
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int32_t w = 0; w < 4; ++w) {
      if (dtype == kFloat32) {
        values[i + w] = bits_as<float>(words[w]);
      } else {
        split(words[w], &values[i + 2 * w], dtype == kFloat16);
      }
    }
  }
}

// 16 codes at an even address (wire_format.h): one store where aligned, else 4 or 8.
PDTRIM_BOTH void store_step(uint8_t* to, const uint32_t (&words)[4]) {
  if (aligned(to, 16)) {
    uint4 vector;
    vector.x = words[0], vector.y = words[1], vector.z = words[2], vector.w = words[3];
    *reinterpret_cast<uint4*>(to) = vector;
  } else if (aligned(to, 4)) {
#pragma unroll
    for (int32_t w = 0; w < 4; ++w) reinterpret_cast<uint32_t*>(to)[w] = words[w];
  } else {
#pragma unroll
    for (int32_t w = 0; w < 8; ++w) reinterpret_cast<uint16_t*>(to)[w] = uint16_t(words[w / 2] >> (16 * (w % 2)));
  }
}

// A warp per row of K or of V, kLanesPerHead lanes per head: one pass for the head's largest value, one for its codes
// (the second reads what the first left in L1).
template <int32_t dtype, int32_t wire>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock, kBlocksPerSM) quantise_rows(const Args args) {
  const Layout& layout = args.layout;
  const int32_t lane = threadIdx.x % kLanesPerHead;
  const uint32_t group = ((1u << kLanesPerHead) - 1) << (threadIdx.x - lane);
  const int32_t whole = layout.dim / kStep * kStep;
  for (int64_t pair = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; pair < 2 * layout.rows;
       pair += int64_t{gridDim.x} * blockDim.y) {
    const int32_t side = pair >= layout.rows;
    const int64_t row = pair - side * layout.rows;
    const int64_t slot = slot_of(args, row);
    for (int32_t head = threadIdx.x / kLanesPerHead; head < layout.heads; head += kWarp / kLanesPerHead) {
      const uint8_t* const from = (side ? args.v : args.k) + layout.source(slot, head);
      uint8_t* const to = args.to + layout.codes(side, row, head);
      float values[kStep];
      uint32_t largest = 0;
      for (int32_t i = lane * kStep; i < whole; i += kLanesPerHead * kStep) {
        load_step<dtype>(from, i, values);
#pragma unroll
        for (int32_t j = 0; j < kStep; ++j) largest = larger(largest, magnitude(values[j]));
      }
      for (int32_t i = whole + lane; i < layout.dim; i += kLanesPerHead) {
        largest = larger(largest, magnitude(load<dtype>(from, i)));
      }
#pragma unroll
      for (int32_t other = kLanesPerHead / 2; other; other /= 2) {
        largest = larger(largest, __shfl_xor_sync(group, largest, other, kLanesPerHead));
      }
      const uint16_t half = scale_bits<wire>(largest);
      const float by = inverse(half);
      if (lane == 0) *reinterpret_cast<uint16_t*>(args.to + layout.scale(side, row, head)) = half;
      for (int32_t i = lane * kStep; i < whole; i += kLanesPerHead * kStep) {
        load_step<dtype>(from, i, values);
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int32_t j = 0; j < kStep; ++j) words[j / 4] |= uint32_t(code<wire>(values[j], by)) << (8 * (j % 4));
        store_step(to + i, words);
      }
      for (int32_t i = whole + lane; i < layout.dim; i += kLanesPerHead) to[i] = code<wire>(load<dtype>(from, i), by);
    }
  }
}

using Kernel = void (*)(Args);

Kernel kernel_for(int32_t dtype, int32_t wire) {
  static const Kernel kernels[3][3] = {
      {copy_rows<uint32_t>, quantise_rows<kFloat32, kInt8>, quantise_rows<kFloat32, kFp8>},
      {copy_rows<uint16_t>, quantise_rows<kFloat16, kInt8>, quantise_rows<kFloat16, kFp8>},
      {copy_rows<uint16_t>, quantise_rows<kBFloat16, kInt8>, quantise_rows<kBFloat16, kFp8>},
  };
  return kernels[dtype][wire];
}

}  // namespace
}  // namespace pdtrim

extern "C" int64_t pdtrim_packed_bytes(const PdtrimSend* send) { return 2 * pdtrim::layout_of(*send).side_bytes(); }

extern "C" int pdtrim_sparse_kv_send(const PdtrimSend* send, void* stream) {
  using namespace pdtrim;
  if (!valid(*send)) return cudaErrorInvalidValue;
  if (send->num_rows == 0) return cudaSuccess;
  const Args args{static_cast<const uint8_t*>(send->k), static_cast<const uint8_t*>(send->v), send->rows,
                  static_cast<uint8_t*>(send->staging) + send->offset, layout_of(*send),
                  send->row_index_bytes == 8};
  const int64_t blocks = (2 * send->num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const dim3 grid(uint32_t(blocks < kMaxBlocks ? blocks : kMaxBlocks)), block(kWarp, kWarpsPerBlock);
  const Kernel kernel = kernel_for(send->dtype, send->wire);
  PDTRIM_LAUNCH(kernel, grid, block, stream, args);
  return cudaPeekAtLastError();
}

extern "C" int pdtrim_stand_in(void* output, const void* input, int64_t bytes, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (!input) return cudaMemsetAsync(output, 0, size_t(bytes), queue);
  return cudaMemcpyAsync(output, input, size_t(bytes), cudaMemcpyDeviceToDevice, queue);
}

extern "C" int pdtrim_sparse_kv_send_reference(const PdtrimSend* send) {
  if (!pdtrim::valid(*send)) return 1;
  pdtrim::reference(*send);
  return 0;
}
