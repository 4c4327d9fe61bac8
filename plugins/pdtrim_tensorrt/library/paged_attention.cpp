#include "paged_attention.h"

#include <atomic>

#include "plugin.h"
#include "sparse_kv_send.h"

namespace pdtrim {
namespace {

using nvinfer1::DataType;

std::atomic<PdtrimAttention> runtime_attention{nullptr};
std::atomic<void*> runtime_user{nullptr};

struct AttentionAttributes {
  int32_t layer_id = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;

  AttentionAttributes() = default;
  explicit AttentionAttributes(Fields& from)
      : layer_id(from.integer("layer_id")),
        heads(from.integer("num_heads")),
        kv_heads(from.integer("num_kv_heads")),
        head_dim(from.integer("head_dim")),
        scale(from.real("scale")) {}

  std::string wrong() const {
    if (kv_heads < 1 || head_dim < 1 || heads < 1) return "num_heads, num_kv_heads and head_dim must be positive";
    return heads % kv_heads ? "num_heads must be a multiple of num_kv_heads" : "";
  }
  std::vector<nvinfer1::PluginField> fields() const {
    using Type = nvinfer1::PluginFieldType;
    return {{"layer_id", &layer_id, Type::kINT32, 1},
            {"num_heads", &heads, Type::kINT32, 1},
            {"num_kv_heads", &kv_heads, Type::kINT32, 1},
            {"head_dim", &head_dim, Type::kINT32, 1},
            {"scale", &scale, Type::kFLOAT32, 1}};
  }
};

struct WriteAttributes {
  int32_t layer_id = 0, kv_heads = 0, head_dim = 0;

  WriteAttributes() = default;
  explicit WriteAttributes(Fields& from)
      : layer_id(from.integer("layer_id")), kv_heads(from.integer("num_kv_heads")), head_dim(from.integer("head_dim")) {}

  std::string wrong() const { return kv_heads < 1 || head_dim < 1 ? "num_kv_heads and head_dim must be positive" : ""; }
  std::vector<nvinfer1::PluginField> fields() const {
    using Type = nvinfer1::PluginFieldType;
    return {{"layer_id", &layer_id, Type::kINT32, 1},
            {"num_kv_heads", &kv_heads, Type::kINT32, 1},
            {"head_dim", &head_dim, Type::kINT32, 1}};
  }
};

// Both ops: the first input's shape comes out, and the runtime is called with all three.
template <typename Self, typename Given>
class ToTheRuntime : public Plugin<Self> {
 public:
  using Attributes = Given;
  const Attributes attributes;

  explicit ToTheRuntime(const Attributes& given) : attributes(given) {}
  ToTheRuntime(const ToTheRuntime& other) : Plugin<Self>(), attributes(other.attributes) {}

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder&) noexcept override {
    if (inputs != 3) return -1;
    out[0] = in[0];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && this->activation(tensor.type) &&
           tensor.type == tensors[0].desc.type;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    if (this->building) return pdtrim_stand_in(outputs[0], inputs[0], this->bytes(in[0]), stream);
    const PdtrimAttention attend = runtime_attention;
    if (!attend) {
      refuse(std::string(Self::kName) +
             ": no runtime has registered its attention; call pdtrim_set_attention before the engine runs");
      return -1;
    }
    const int64_t kv_width = int64_t{attributes.kv_heads} * attributes.head_dim;
    PdtrimAttentionCall call{};
    static_cast<const Self*>(this)->describe(call);
    call.width = int32_t(in[0].dims.d[1]);
    if ((call.num_heads && call.width != int64_t{call.num_heads} * attributes.head_dim) || in[1].dims.d[1] != kv_width ||
        in[2].dims.d[1] != kv_width) {
      refuse(std::string(Self::kName) + ": an input is not heads * head_dim wide");
      return -1;
    }
    call.q = inputs[0];
    call.k = inputs[1];
    call.v = inputs[2];
    call.output = outputs[0];
    call.stream = stream;
    call.tokens = in[0].dims.d[0];
    call.layer_id = attributes.layer_id;
    call.num_kv_heads = attributes.kv_heads;
    call.head_dim = attributes.head_dim;
    call.dtype = in[0].type == DataType::kFLOAT ? kFloat32 : in[0].type == DataType::kHALF ? kFloat16 : kBFloat16;
    return attend(runtime_user, &call);
  }
};

class PagedAttention final : public ToTheRuntime<PagedAttention, AttentionAttributes> {
 public:
  using ToTheRuntime::ToTheRuntime;
  static constexpr const char* kName = "PagedAttention";

  void describe(PdtrimAttentionCall& call) const {
    call.num_heads = attributes.heads;
    call.scale = attributes.scale;
  }
};

class KVWrite final : public ToTheRuntime<KVWrite, WriteAttributes> {
 public:
  using ToTheRuntime::ToTheRuntime;
  static constexpr const char* kName = "KVWrite";

  void describe(PdtrimAttentionCall&) const {}
};

}  // namespace

nvinfer1::IPluginCreatorInterface* paged_attention_creator() {
  static Creator<PagedAttention> creator;
  return &creator;
}

nvinfer1::IPluginCreatorInterface* kv_write_creator() {
  static Creator<KVWrite> creator;
  return &creator;
}

}  // namespace pdtrim

extern "C" void pdtrim_set_attention(PdtrimAttention attention, void* user) {
  pdtrim::runtime_user = user;
  pdtrim::runtime_attention = attention;
}
