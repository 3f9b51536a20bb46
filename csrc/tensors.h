#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace dynmm {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class List>
std::string list_of(const List& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// torch's own macro for this was renamed between 2.10 and 2.13.
inline void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("dynmm_kernels: a call to torch failed");
}

struct Device {
  int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// What an op must know of a tensor that outlives this, read once: a call into torch costs as much
// as moving a row. Kernels of a device meet strided tensors only: others have dispatch keys of
// their own.
struct Operand {
  const Tensor& tensor;
  Sizes sizes, strides;
  ScalarType dtype;
  Device device;

  explicit Operand(const Tensor& t) : tensor(t) {
    const AtenTensorHandle handle = t.get();
    int64_t dims, *extents;
    int32_t type;
    check(aoti_torch_get_dim(handle, &dims));
    check(aoti_torch_get_sizes(handle, &extents));
    sizes = Sizes(extents, static_cast<size_t>(dims));
    check(aoti_torch_get_strides(handle, &extents));
    strides = Sizes(extents, static_cast<size_t>(dims));
    check(aoti_torch_get_dtype(handle, &type));
    dtype = static_cast<ScalarType>(type);
    check(aoti_torch_get_device_type(handle, &device.type));
    check(aoti_torch_get_device_index(handle, &device.index));
  }

  size_t dims() const { return sizes.size(); }
  int64_t rows() const { return sizes[0]; }
  int64_t element_size() const {
    return static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(dtype)));
  }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }
};

// Set in tests: what a kernel then leaves unwritten is NaN, true, or bytes of 0x7f (NaN in fp8). On
// a GPU torch's own deterministic mode does the same.
inline const bool kPoisoned = [] {
  const char* value = std::getenv("DYNMM_POISON");
  return value != nullptr && *value != '\0';
}();

inline void poison(const Tensor& t, ScalarType dtype) {
  const bool floating = accumulates_in_float(dtype) || accumulates_in_double(dtype);
  const int byte = dtype == ScalarType::Bool ? 1 : floating ? 0xff : 0x7f;
  const auto bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes > 0) std::memset(t.mutable_data_ptr(), byte, bytes);
}

// Uninitialised. The C shim allocates on the CPU without a trip through the dispatcher, which
// matters when a whole batch takes tens of microseconds.
inline Tensor empty_strided(Device device, size_t dims, const int64_t* sizes,
                            const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides,
                               static_cast<int32_t>(dtype), device.type, device.index,
                               &handle) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("dynmm_kernels: torch could not allocate a tensor of shape " +
                             list_of(Sizes(sizes, dims)));
  }
  Tensor t(handle);
  if (kPoisoned && device.type == aoti_torch_device_type_cpu()) poison(t, dtype);
  return t;
}

inline Tensor empty_vector(Device device, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(device, 1, &size, &stride, dtype);
}

inline Tensor empty_matrix(Device device, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns > 0 ? columns : 1, 1};
  return empty_strided(device, 2, sizes, strides, dtype);
}

// Uninitialised, `rows` rows of the shape and dtype of those of `like`.
inline Tensor empty_rows(const Operand& like, int64_t rows, const int64_t* strides) {
  std::vector<int64_t> sizes(like.sizes.begin(), like.sizes.end());
  sizes[0] = rows;
  return empty_strided(like.device, sizes.size(), sizes.data(), strides, like.dtype);
}

// Whether values can be read where they lie; torch copies those that cannot.
inline bool is_aligned(const void* data, ScalarType dtype) {
  const auto size = aoti_torch_dtype_element_size(static_cast<int32_t>(dtype));
  return reinterpret_cast<uint64_t>(data) % (size / reals_per_element(dtype)) == 0;
}

// What kernels read by pointer: plans and weights are contiguous unless somebody sliced them.
inline Tensor as_contiguous(const Operand& t) {
  if (!t.tensor.is_contiguous()) return torch::stable::contiguous(t.tensor);
  if (is_aligned(t.tensor.const_data_ptr(), t.dtype)) return t.tensor;
  Tensor copy = empty_strided(t.device, t.dims(), t.sizes.data(), t.strides.data(), t.dtype);
  return torch::stable::copy_(copy, t.tensor);
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace dynmm
