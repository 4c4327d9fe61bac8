// SparseKVSend(k, v [T, kv_heads * head_dim], rows int64 [R]) -> packed
//   native: [2, R, kv_heads * head_dim] in the dtype of k
//   int8, fp8: int8 [bytes], to be read as uint8: TensorRT takes no uint8 output from a plugin
// The bytes: kernels/wire_format.h.
// The engine's output binding *is* the staging buffer: the kernel writes where the transport reads.
#include "sparse_kv_send.h"

#include "plugin.h"

namespace pdtrim {
namespace {

using nvinfer1::DataType;

struct SendAttributes {
  int32_t layer_id = 0, kv_heads = 0, head_dim = 0;
  std::string wire_dtype;

  SendAttributes() = default;
  explicit SendAttributes(Fields& from)
      : layer_id(from.integer("layer_id")),
        kv_heads(from.integer("num_kv_heads")),
        head_dim(from.integer("head_dim")),
        wire_dtype(from.text("wire_dtype")) {}

  int32_t wire() const { return wire_dtype == "native" ? kNative : wire_dtype == "int8" ? kInt8 : kFp8; }
  std::string wrong() const {
    if (wire_dtype != "native" && wire_dtype != "int8" && wire_dtype != "fp8") {
      return "wire_dtype " + wire_dtype + " is none of native, int8, fp8";
    }
    if (kv_heads < 1 || head_dim < 1) return "num_kv_heads and head_dim must be positive";
    return wire() != kNative && head_dim % 2 ? "int8 and fp8 need an even head_dim" : "";
  }
  std::vector<nvinfer1::PluginField> fields() const {
    using Type = nvinfer1::PluginFieldType;
    return {{"layer_id", &layer_id, Type::kINT32, 1},
            {"num_kv_heads", &kv_heads, Type::kINT32, 1},
            {"head_dim", &head_dim, Type::kINT32, 1},
            {"wire_dtype", wire_dtype.c_str(), Type::kCHAR, int32_t(wire_dtype.size())}};
  }
};

class SparseKVSend final : public Plugin<SparseKVSend> {
 public:
  using Attributes = SendAttributes;
  static constexpr const char* kName = "SparseKVSend";
  const Attributes attributes;

  explicit SparseKVSend(Attributes given) : attributes(std::move(given)) {}
  SparseKVSend(const SparseKVSend& other) : Plugin(), attributes(other.attributes) {}

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = attributes.wire() == kNative ? in[0] : DataType::kINT8;
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder& build) noexcept override {
    if (inputs != 3) return -1;
    const nvinfer1::IDimensionExpr* const rows = in[2].d[0];
    if (attributes.wire() == kNative) {
      out[0].nbDims = 3;
      out[0].d[0] = build.constant(2);
      out[0].d[1] = rows;
      out[0].d[2] = in[0].d[1];
    } else {
      const Layout one_row{1, attributes.kv_heads, attributes.head_dim, 0, attributes.wire()};
      out[0].nbDims = 1;
      out[0].d[0] = build.operation(nvinfer1::DimensionOperation::kPROD, *rows, *build.constant(2 * one_row.side_bytes()));
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    switch (position) {
      case 0: return activation(tensor.type);
      case 2: return tensor.type == DataType::kINT64 || tensor.type == DataType::kINT32;
      case 3: if (attributes.wire() != kNative) return tensor.type == DataType::kINT8; [[fallthrough]];
      default: return tensor.type == tensors[0].desc.type;
    }
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept override {
    if (building) return pdtrim_stand_in(outputs[0], nullptr, bytes(out[0]), stream);  // the rows are made up
    PdtrimSend send{};
    send.k = inputs[0];
    send.v = inputs[1];
    send.rows = inputs[2];
    send.staging = outputs[0];
    send.num_rows = in[2].dims.d[0];
    send.row_index_bytes = in[2].type == DataType::kINT64 ? 8 : 4;
    send.kv_heads = attributes.kv_heads;
    send.head_dim = attributes.head_dim;
    send.dtype = in[0].type == DataType::kFLOAT ? kFloat32 : in[0].type == DataType::kHALF ? kFloat16 : kBFloat16;
    send.wire = attributes.wire();
    if (in[0].dims.d[1] != layout_of(send).width()) {
      refuse("SparseKVSend: k is not num_kv_heads * head_dim wide");
      return -1;
    }
    return pdtrim_sparse_kv_send(&send, stream);
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* sparse_kv_send_creator() {
  static Creator<SparseKVSend> creator;
  return &creator;
}

}  // namespace pdtrim
