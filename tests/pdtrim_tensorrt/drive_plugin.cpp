// Drives the plugin library as TensorRT would, on the host: creator -> plugin -> serialised fields -> plugin -> enqueue.
// Compiled by test_library.py with TensorRT's headers and linked to the library built with PDTRIM_ON_HOST.
#include <NvInfer.h>

#include <cstdio>
#include <cstring>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

IPluginCreatorV3One* creator_of(const char* op) {
  int32_t count = 0;
  IPluginCreatorInterface* const* const creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (!std::strcmp(creator->getPluginName(), op) && !std::strcmp(creator->getPluginNamespace(), "pdtrim")) return creator;
  }
  return nullptr;
}

bool timing = false;  // drive plugins of the build, as a builder does that times them

// The plugin, and one made from what it serialises: what an engine holds.
IPluginV3* through_a_plan(const char* op, std::vector<PluginField> fields) {
  IPluginCreatorV3One* const creator = creator_of(op);
  const PluginFieldCollection given{int32_t(fields.size()), fields.data()};
  IPluginV3* const built = creator ? creator->createPlugin("node", &given, TensorRTPhase::kBUILD) : nullptr;
  if (!built || timing) return built;
  auto* const runtime = static_cast<IPluginV3OneRuntime*>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* const loaded = creator->createPlugin("node", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  delete built;
  return loaded;
}

PluginTensorDesc matrix(int32_t type, int64_t rows, int64_t columns) {
  PluginTensorDesc desc{};
  desc.type = DataType(type);
  desc.format = TensorFormat::kLINEAR;
  desc.dims.nbDims = columns ? 2 : 1;
  desc.dims.d[0] = rows;
  desc.dims.d[1] = columns;
  return desc;
}

int run(IPluginV3* plugin, const std::vector<PluginTensorDesc>& in, const std::vector<const void*>& inputs, void* output,
        Dims shape, void* stream, int32_t output_type, bool* formats) {
  if (!plugin) return -100;
  auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  std::vector<DynamicPluginTensorDesc> all(in.size() + 1);
  for (size_t i = 0; i < in.size(); ++i) all[i].desc = in[i];
  std::vector<DataType> types(in.size());
  for (size_t i = 0; i < in.size(); ++i) types[i] = in[i].type;
  DataType made{};
  build->getOutputDataTypes(&made, 1, types.data(), int32_t(in.size()));
  all.back().desc = matrix(int32_t(made), 1, 1);
  all.back().desc.dims = shape;
  *formats = int32_t(made) == output_type;
  for (size_t i = 0; i < all.size(); ++i) {
    *formats = *formats && build->supportsFormatCombination(int32_t(i), all.data(), int32_t(in.size()), 1);
  }
  IPluginV3* const attached =
      static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME))->attachToContext(nullptr);
  auto* const runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  void* outputs[] = {output};
  const int status = runtime->enqueue(in.data(), &all.back().desc, inputs.data(), outputs, nullptr, cudaStream_t(stream));
  delete attached;
  delete plugin;
  return status;
}

}  // namespace

extern "C" void drive_timing(bool on) { timing = on; }

extern "C" int drive_send(const char* wire, int32_t wide_attributes, int64_t heads, int64_t dim, int32_t type, int64_t slots,
                          int64_t width, const void* k, const void* v, const void* rows, int64_t num_rows, void* staging,
                          int64_t output_bytes, int32_t output_type, bool* formats) {
  const int64_t wide[] = {7, heads, dim};
  const int32_t narrow[] = {7, int32_t(heads), int32_t(dim)};
  const char* const names[] = {"layer_id", "num_kv_heads", "head_dim"};
  std::vector<PluginField> fields;
  for (int i = 0; i < 3; ++i) {
    if (wide_attributes) fields.push_back({names[i], &wide[i], PluginFieldType::kINT64, 1});
    else fields.push_back({names[i], &narrow[i], PluginFieldType::kINT32, 1});
  }
  if (wire) fields.push_back({"wire_dtype", wire, PluginFieldType::kCHAR, int32_t(std::strlen(wire))});
  const PluginTensorDesc pool = matrix(type, slots, width);
  Dims shape{1, {output_bytes}};
  if (wire && !std::strcmp(wire, "native")) shape = Dims{3, {2, num_rows, width}};
  return run(through_a_plan("SparseKVSend", fields), {pool, pool, matrix(int32_t(DataType::kINT64), num_rows, 0)}, {k, v, rows},
             staging, shape, nullptr, output_type, formats);
}

extern "C" int drive_write(int32_t layer, int32_t kv_heads, int32_t dim, int64_t width, int32_t type, int64_t tokens,
                           const void* hidden, const void* k, const void* v, void* output, void* stream, bool* formats) {
  const std::vector<PluginField> fields = {{"layer_id", &layer, PluginFieldType::kINT32, 1},
                                           {"num_kv_heads", &kv_heads, PluginFieldType::kINT32, 1},
                                           {"head_dim", &dim, PluginFieldType::kINT32, 1}};
  const PluginTensorDesc kv = matrix(type, tokens, int64_t{kv_heads} * dim);
  return run(through_a_plan("KVWrite", fields), {matrix(type, tokens, width), kv, kv}, {hidden, k, v}, output,
             matrix(type, tokens, width).dims, stream, type, formats);
}

extern "C" int drive_attention(int32_t layer, int32_t heads, int32_t kv_heads, int32_t dim, float scale, int32_t type,
                               int64_t tokens, const void* q, const void* k, const void* v, void* output, void* stream,
                               bool* formats) {
  const std::vector<PluginField> fields = {{"layer_id", &layer, PluginFieldType::kINT32, 1},
                                           {"num_heads", &heads, PluginFieldType::kINT32, 1},
                                           {"num_kv_heads", &kv_heads, PluginFieldType::kINT32, 1},
                                           {"head_dim", &dim, PluginFieldType::kINT32, 1},
                                           {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
  const PluginTensorDesc kv = matrix(type, tokens, int64_t{kv_heads} * dim);
  return run(through_a_plan("PagedAttention", fields), {matrix(type, tokens, int64_t{heads} * dim), kv, kv}, {q, k, v}, output,
             matrix(type, tokens, int64_t{heads} * dim).dims, stream, type, formats);
}
