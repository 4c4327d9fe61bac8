// What the plugins and their creators have in common.
#pragma once

#include <NvInfer.h>

#include <exception>
#include <vector>

#include "fields.h"

namespace pdtrim {

constexpr const char* kNamespace = "pdtrim";
constexpr const char* kVersion = "1";

// An IPluginV3 with one output. Self gives kName, Attributes, and the methods that differ.
//
// A builder times plugins: it calls enqueue on plugins of phase kBUILD, on made-up inputs, where no runtime is attached.
// Such a plugin neither calls the runtime nor follows an index that it reads: it copies its first input, or writes zeros.
// IPluginV3OneBuildV2::getAliasedInput (output in place of the first input) is not used: it is a preview feature for
// which TensorRT may copy instead; attention kernels split over the keys read q while others write; KVWrite would save
// one copy of [T, width] in each KV-only layer.
template <typename Self>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
      default: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    }
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    Self* const copy = new Self(static_cast<const Self&>(*this));
    copy->building = building;
    return copy;
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const char* getPluginName() const noexcept override { return Self::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = static_cast<const Self*>(this)->attributes.fields();
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

  bool building = false;  // made in phase kBUILD, or a clone of such

 protected:
  static int64_t bytes(const nvinfer1::PluginTensorDesc& tensor) {
    int64_t elements = 1;
    for (int32_t i = 0; i < tensor.dims.nbDims; ++i) elements *= tensor.dims.d[i];
    const bool wide = tensor.type == nvinfer1::DataType::kFLOAT, narrow = tensor.type == nvinfer1::DataType::kINT8;
    return elements * (wide ? 4 : narrow ? 1 : 2);
  }
  static bool activation(nvinfer1::DataType type) {
    return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
  }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

template <typename Self>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return Self::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      Fields fields(Self::kName, *given);
      typename Self::Attributes attributes(fields);
      const std::string& wrong = fields.missing().empty() ? attributes.wrong() : fields.missing();
      if (!wrong.empty()) return refuse(std::string(Self::kName) + ": " + wrong);
      Self* const plugin = new Self(attributes);
      plugin->building = phase == nvinfer1::TensorRTPhase::kBUILD;
      return plugin;
    } catch (const std::exception& error) {
      return refuse(error.what());
    }
  }

 private:
  const typename Self::Attributes any_{};
  std::vector<nvinfer1::PluginField> fields_ = any_.fields();
  nvinfer1::PluginFieldCollection collection_{int32_t(fields_.size()), fields_.data()};
};

nvinfer1::IPluginCreatorInterface* sparse_kv_send_creator();
nvinfer1::IPluginCreatorInterface* paged_attention_creator();
nvinfer1::IPluginCreatorInterface* kv_write_creator();

}  // namespace pdtrim
