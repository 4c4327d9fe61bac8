// The narrow interface between an engine and the runtime's attention: a callback, called on the host while the engine
// enqueues (or while its stream is captured), which enqueues attention on the engine's stream.
//
// PagedAttention(q [T, heads * head_dim], k, v [T, kv_heads * head_dim]; layer_id) -> [T, heads * head_dim]
// SGLang's attention backend appends k and v to its paged pool and attends to what the pool holds.
// KVWrite(hidden [T, width], k, v; layer_id) -> hidden: a layer that is there for its K and V alone. They are appended,
// and the runtime copies its first input, here q, to the output; num_heads is 0.
// Layers follow one another on that stream only if the engine was built with max_aux_streams = 0.
// Never run on a GPU: the callback has only been called on the host.
#pragma once

#include <cstdint>

extern "C" {

struct PdtrimAttentionCall {
  const void* q;    // device pointers, contiguous
  const void* k;
  const void* v;
  void* output;
  void* stream;     // cudaStream_t: everything must be enqueued on it, nothing may synchronise or allocate while captured
  int64_t tokens;   // T
  int32_t layer_id;
  int32_t width;    // elements of a row of q and of output
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t dtype;    // pdtrim::Dtype
  float scale;
};

// Returns 0; anything else fails the engine's enqueue. May be called from any thread that runs an engine.
typedef int (*PdtrimAttention)(void* user, const PdtrimAttentionCall* call);

// One callback a process, for every engine in it (a worker has one engine); nullptr takes it away. Do not set it while
// an engine runs.
void pdtrim_set_attention(PdtrimAttention attention, void* user);
}
