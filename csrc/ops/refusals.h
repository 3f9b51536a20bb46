#pragma once

#include <algorithm>
#include <iterator>
#include <sstream>
#include <string>

#include "tensors.h"

namespace dynmm {

// What the ops refuse, and the words; ops/checks.py refuses the same in the same order.

constexpr int64_t kMostBranches = 1 << 20;
constexpr int64_t kMostEntries = (int64_t{1} << 31) - 2;
constexpr int64_t kMostSlots = (int64_t{1} << 31) - 1;

// The text arrives in Python as it is; STD_TORCH_CHECK would put a function and a file before it.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// As Python calls it, in the order of ScalarType.
inline std::string name_of(ScalarType dtype) {
  std::istringstream names(
      "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool "
      "qint8 quint8 qint32 bfloat16 quint4x2 quint2x4 bits1x8 bits2x4 bits4x2 bits8 bits16 "
      "float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz uint16 uint32 uint64 "
      "uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 "
      "float8_e8m0fnu float4_e2m1fn_x2");
  const auto number = static_cast<int>(dtype);
  std::string name;
  for (int i = 0; i <= number; ++i) {
    if (!(names >> name)) return "dtype number " + std::to_string(number);
  }
  return name;
}

inline std::string name_of(Device device) {
  std::string name = "device type " + std::to_string(device.type);
  if (device.type == aoti_torch_device_type_cpu()) name = "cpu";
  if (device.type == aoti_torch_device_type_cuda()) name = "cuda";
  if (device.type == aoti_torch_device_type_meta()) name = "meta";
  return device.index < 0 ? name : name + ":" + std::to_string(device.index);
}

inline std::string told(const Operand& t) { return name_of(t.dtype) + " " + list_of(t.sizes); }

inline void check_device(const char* op, const Operand& t, const char* name, Device device) {
  if (t.device == device) return;
  refuse(op, ": all tensors must be on ", name_of(device), ", as ", name, " is; got one on ",
         name_of(t.device));
}

inline bool same_rows(const Operand& a, const Operand& b) {
  return a.dtype == b.dtype && a.dims() == b.dims() &&
         std::equal(a.sizes.begin() + 1, a.sizes.end(), b.sizes.begin() + 1);
}

// `weights` holds one per entry of the index tensor, which has `entries` of them.
inline void check_weights(const char* op, const char* kind, size_t i, const Operand& values,
                          const Operand& weights, int64_t entries, const char* index) {
  if (!is_weighted(values.dtype)) {
    refuse(op, ": ", kind, " ", i, " must be floating or complex to be weighted; got ",
           told(values));
  }
  const ScalarType dtype = weight_dtype(values.dtype);
  if (weights.dtype == dtype && weights.numel() == entries) return;
  refuse(op, ": weights must be ", name_of(dtype), " with ", entries,
         " elements, one per entry of ", index, "; got ", told(weights));
}

}  // namespace dynmm
