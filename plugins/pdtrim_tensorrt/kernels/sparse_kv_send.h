// Gathers one layer's rows of K and V, quantises them if asked, and packs them into staging (bytes: wire_format.h).
// C interface of the kernel, and a host reference in plain loops that shares its index arithmetic and codecs.
// Free of TensorRT.
#pragma once

#include "wire_format.h"

extern "C" {

// One layer's send. Pointers are device memory for pdtrim_sparse_kv_send, host memory for the reference.
struct PdtrimSend {
  const void* k;            // [slots, kv_heads * head_dim], contiguous
  const void* v;            // likewise
  const void* rows;         // [num_rows], each a slot in [0, slots): not checked, as for torch.index_select
  void* staging;            // aligned for the dtype (2 bytes for int8 and fp8) at `offset`; 16 bytes to be fastest
  int64_t offset;           // bytes from staging's start to this layer's first
  int64_t num_rows;
  int32_t row_index_bytes;  // 4 or 8
  int32_t kv_heads;
  int32_t head_dim;         // even where quantised
  int32_t dtype;            // pdtrim::Dtype
  int32_t wire;             // pdtrim::Wire
};

// Bytes that this send writes: 2 * side_bytes.
int64_t pdtrim_packed_bytes(const PdtrimSend* send);

// Enqueues on `stream` (a cudaStream_t). Allocates nothing, reads nothing back, and its grid depends on shapes alone:
// it can be captured in a CUDA graph. Returns a cudaError_t; cudaErrorInvalidValue for a send against the above.
int pdtrim_sparse_kv_send(const PdtrimSend* send, void* stream);

// Enqueues a copy of `bytes` from `input` to `output` on `stream`, or zeros where `input` is null. Returns a cudaError_t.
int pdtrim_stand_in(void* output, const void* input, int64_t bytes, void* stream);

// The same bytes as pdtrim_sparse_kv_send, in plain loops on the host. Returns 0, or 1 for a send against the above.
int pdtrim_sparse_kv_send_reference(const PdtrimSend* send);
}

namespace pdtrim {

inline Layout layout_of(const PdtrimSend& send) {
  return {send.num_rows, send.kv_heads, send.head_dim, item_bytes(send.dtype), send.wire};
}

inline bool valid(const PdtrimSend& send) {
  const bool known = send.dtype >= kFloat32 && send.dtype <= kBFloat16 && send.wire >= kNative && send.wire <= kFp8;
  const bool indexed = send.row_index_bytes == 4 || send.row_index_bytes == 8;
  if (!known || !indexed || send.num_rows < 0 || send.kv_heads < 1 || send.head_dim < 1 || send.offset < 0) return false;
  if (send.wire != kNative && send.head_dim % 2) return false;
  const uintptr_t item = item_bytes(send.dtype), to = send.wire == kNative ? item : kScaleBytes;
  const uintptr_t from = reinterpret_cast<uintptr_t>(send.k) | reinterpret_cast<uintptr_t>(send.v);
  return from % item == 0 && (reinterpret_cast<uintptr_t>(send.staging) + send.offset) % to == 0;
}

template <int32_t dtype, int32_t wire>
void reference_head(const void* from, int32_t dim, uint8_t* codes, uint8_t* scale) {
  uint32_t largest = 0;
  for (int32_t i = 0; i < dim; ++i) largest = larger(largest, magnitude(load<dtype>(from, i)));
  const uint16_t half = scale_bits<wire>(largest);
  memcpy(scale, &half, sizeof(half));
  for (int32_t i = 0; i < dim; ++i) codes[i] = code<wire>(load<dtype>(from, i), inverse(half));
}

inline void reference(const PdtrimSend& send) {
  using Head = void (*)(const void*, int32_t, uint8_t*, uint8_t*);
  static const Head heads[3][2] = {{reference_head<kFloat32, kInt8>, reference_head<kFloat32, kFp8>},
                                   {reference_head<kFloat16, kInt8>, reference_head<kFloat16, kFp8>},
                                   {reference_head<kBFloat16, kInt8>, reference_head<kBFloat16, kFp8>}};
  const Layout layout = layout_of(send);
  uint8_t* const base = static_cast<uint8_t*>(send.staging) + send.offset;
  for (int32_t side = 0; side < 2; ++side) {
    const uint8_t* const pool = static_cast<const uint8_t*>(side ? send.v : send.k);
    for (int64_t row = 0; row < send.num_rows; ++row) {
      const int64_t slot = send.row_index_bytes == 8 ? static_cast<const int64_t*>(send.rows)[row]
                                                     : static_cast<const int32_t*>(send.rows)[row];
      for (int32_t head = 0; head < send.kv_heads; ++head) {
        const uint8_t* const from = pool + layout.source(slot, head);
        uint8_t* const to = base + layout.codes(side, row, head);
        if (send.wire == kNative) {
          memcpy(to, from, size_t(layout.dim) * layout.item);
        } else {
          heads[send.dtype][send.wire - 1](from, layout.dim, to, base + layout.scale(side, row, head));
        }
      }
    }
  }
}

}  // namespace pdtrim
