// The codes that rows travel in.
#pragma once

#include <cstdint>

namespace {

enum Code : int32_t { kNative, kFp8, kInt8, kInt4, kInt3 };
constexpr bool is_rotated(Code code) { return code == kInt4 || code == kInt3; }
constexpr int code_bytes(Code code, int dim) {  // of one head
  return code == kInt4 ? dim / 2 : code == kInt3 ? dim * 3 / 8 : dim;
}
constexpr int kMaxDim = 1024;

}  // namespace
