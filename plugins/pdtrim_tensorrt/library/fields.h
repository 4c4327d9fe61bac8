// Plugin attributes: reading what the ONNX parser or a plan file hands over, and handing them back.
#pragma once

#include <NvInfer.h>

#include <string>
#include <vector>

namespace pdtrim {

// Tells the engine's logger, or standard error where none was set. Returns nullptr, for `return refuse(...)`.
nvinfer1::IPluginV3* refuse(const std::string& why) noexcept;

// Attributes by name. The parser hands ONNX integers over as INT32 or INT64, depending on its version.
class Fields {
 public:
  Fields(const char* op, const nvinfer1::PluginFieldCollection& fields) : op_(op), fields_(fields) {}

  int32_t integer(const char* name);
  float real(const char* name);
  std::string text(const char* name);
  const std::string& missing() const { return missing_; }  // what was asked for and is not there; empty if all was

 private:
  const nvinfer1::PluginField* find(const char* name);

  std::string op_, missing_;
  const nvinfer1::PluginFieldCollection& fields_;
};

}  // namespace pdtrim
