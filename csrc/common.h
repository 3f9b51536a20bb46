#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace dynmm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Strides = std::vector<int64_t>;

// torch's own macro for this was renamed between 2.10 and 2.13.
inline void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("dynmm_kernels: a call to torch failed");
}

// Uninitialised, on the device of `like`. The C shim allocates without a trip through the
// dispatcher, which matters when a whole batch takes tens of microseconds.
inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes,
                            const int64_t* strides, ScalarType dtype) {
  int32_t device_type, device_index;
  check(aoti_torch_get_device_type(like.get(), &device_type));
  check(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype), device_type,
                                 device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, dtype);
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns > 0 ? columns : 1, 1};
  return empty_strided(like, 2, sizes, strides, dtype);
}

// A sample's row in memory. `dense`: its elements fill one block, whatever their order
// (contiguous, channels_last, transposed), so that moving the block moves the row.
struct RowLayout {
  int64_t numel = 1;
  int64_t bytes = 0;
  bool dense = true;
  Strides strides;  // of fresh rows in this layout, dim 0 included

  explicit RowLayout(const Tensor& t) {
    const auto sizes = t.sizes();
    const auto old = t.strides();
    const size_t dims = sizes.size();
    for (size_t d = 1; d < dims; ++d) numel *= sizes[d];
    bytes = numel * static_cast<int64_t>(t.element_size());
    dense = fills_a_block(sizes, old);
    strides.assign(dims, 1);
    int64_t step = 1;
    for (size_t d = dims; d-- > 1;) {
      strides[d] = dense && numel > 0 ? old[d] : step;
      step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    strides[0] = numel > 0 ? numel : step;
  }

 private:
  template <class Sizes>
  bool fills_a_block(const Sizes& sizes, const Sizes& old) const {
    if (numel <= 1) return true;
    // Walk from the fastest dimension up: each must start where the last one ended.
    int64_t filled = 1;
    for (size_t step = 1; step < sizes.size(); ++step) {
      if (filled == numel) return true;
      bool found = false;
      for (size_t d = sizes.size(); d-- > 1 && !found;) {
        if (sizes[d] > 1 && old[d] == filled) {
          filled *= sizes[d];
          found = true;
        }
      }
      if (!found) return false;
    }
    return filled == numel;
  }
};

inline Tensor empty_rows(const Tensor& like, int64_t rows, const RowLayout& layout) {
  const auto sizes = like.sizes();
  Strides shape(sizes.data(), sizes.data() + sizes.size());
  shape[0] = rows;
  return empty_strided(like, static_cast<int64_t>(shape.size()), shape.data(),
                       layout.strides.data(), like.scalar_type());
}

// `output`, or a copy of it whose rows lie as `layout` says.
inline Tensor in_layout(const Tensor& output, const RowLayout& layout) {
  const auto strides = output.strides();
  const auto sizes = output.sizes();
  bool same = true;
  for (size_t d = 1; d < sizes.size(); ++d) {
    same &= sizes[d] <= 1 || strides[d] == layout.strides[d];
  }
  if (same) return output;
  Tensor copy = empty_rows(output, output.size(0), layout);
  return torch::stable::copy_(copy, output);
}

// Rows that can be moved as blocks: `t` itself, or a copy where its rows have holes.
inline Tensor as_blocks(const Tensor& t, const RowLayout& layout) {
  return layout.dense ? t : torch::stable::contiguous(t);
}

// int32 index tensors are read by pointer; plans are contiguous unless somebody sliced them.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int64_t row_stride_bytes(const Tensor& t) {
  return t.stride(0) * static_cast<int64_t>(t.element_size());
}

// fp32 accumulates fp16, bf16 and fp32; fp64 accumulates itself; integers wrap around.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double,
                                       std::conditional_t<std::is_integral_v<T>, int64_t, float>>;

// Calls f(T{}) with the C++ type of `dtype`. Complex numbers go as pairs of real ones, which is
// exact for sums, for real weights and for the real part of an inner product.
template <class F>
auto visit_dtype(ScalarType dtype, const F& f) -> decltype(f(float{})) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return f(float{});
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Long:
      return f(int64_t{});
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Short:
      return f(int16_t{});
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Byte:
      return f(uint8_t{});
    default:
      STD_TORCH_CHECK(false, "dynmm_kernels: no arithmetic for dtype number ",
                      static_cast<int>(dtype), "; convert the tensors to a floating dtype");
  }
  return f(float{});  // not reached
}

// As visit_dtype, for what a gate or a weight can be.
template <class F>
auto visit_floating(ScalarType dtype, const F& f) -> decltype(f(float{})) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::ComplexFloat,
                      "dynmm_kernels: dtype number ", static_cast<int>(dtype), " is not floating");
      return f(float{});
  }
}

inline int64_t reals_per_element(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble ? 2 : 1;
}

inline bool accumulates_in_double(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::ComplexDouble;
}

}  // namespace dynmm
