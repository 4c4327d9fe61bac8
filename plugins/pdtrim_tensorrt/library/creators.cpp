// What TensorRT looks for in a plugin library, and how the plugins read and refuse attributes.
#include "plugin.h"

#include <atomic>
#include <cstdio>
#include <cstring>

namespace pdtrim {
namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}

nvinfer1::IPluginV3* refuse(const std::string& why) noexcept {
  nvinfer1::ILoggerFinder* const finder = logger_finder;
  nvinfer1::ILogger* const logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, why.c_str());
  } else {
    std::fprintf(stderr, "pdtrim: %s\n", why.c_str());
  }
  return nullptr;
}

const nvinfer1::PluginField* Fields::find(const char* name) {
  for (int32_t i = 0; i < fields_.nbFields; ++i) {
    if (!std::strcmp(fields_.fields[i].name, name) && fields_.fields[i].data) return &fields_.fields[i];
  }
  missing_ = std::string("attribute ") + name + " is missing";
  return nullptr;
}

int32_t Fields::integer(const char* name) {
  const nvinfer1::PluginField* const field = find(name);
  if (!field) return 0;
  if (field->type == nvinfer1::PluginFieldType::kINT64) return int32_t(*static_cast<const int64_t*>(field->data));
  if (field->type == nvinfer1::PluginFieldType::kINT32) return *static_cast<const int32_t*>(field->data);
  missing_ = std::string("attribute ") + name + " is not an integer";
  return 0;
}

float Fields::real(const char* name) {
  const nvinfer1::PluginField* const field = find(name);
  if (!field) return 0;
  if (field->type == nvinfer1::PluginFieldType::kFLOAT32) return *static_cast<const float*>(field->data);
  missing_ = std::string("attribute ") + name + " is not a float32";
  return 0;
}

std::string Fields::text(const char* name) {
  const nvinfer1::PluginField* const field = find(name);
  if (!field) return {};
  if (field->type == nvinfer1::PluginFieldType::kCHAR) {
    const char* const data = static_cast<const char*>(field->data);
    return std::string(data, strnlen(data, size_t(field->length)));  // with or without its NUL
  }
  missing_ = std::string("attribute ") + name + " is not a string";
  return {};
}

}  // namespace pdtrim

extern "C" {

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { pdtrim::logger_finder = finder; }

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {pdtrim::sparse_kv_send_creator(),
                                                                pdtrim::paged_attention_creator(),
                                                                pdtrim::kv_write_creator()};
  count = 3;
  return creators;
}
}
