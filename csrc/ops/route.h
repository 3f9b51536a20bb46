#pragma once

#include <tuple>

#include "ops/refusals.h"
#include "selections.h"

namespace dynmm {

// Where a kernel writes a plan. header: B+1 offsets, number of faults, first fault or -1.
struct Plan {
  int32_t *order, *inverse, *header;
  int64_t entries;
  int branches;
};

struct PlanTensors {
  Tensor order, inverse, header;

  PlanTensors(Device device, int64_t rows, int64_t ranks, int64_t branches)
      : order(empty_vector(device, rows * ranks, ScalarType::Int)),
        inverse(empty_matrix(device, rows, ranks, ScalarType::Int)),
        header(empty_vector(device, branches + 3, ScalarType::Int)) {}

  // Backend: sort(plan, select).
  template <class Backend, class Select>
  void fill(const Backend& backend, int64_t entries, const Select& select) const {
    const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
    backend.sort(Plan{data(order), data(inverse), data(header), entries, select.branches}, select);
  }
};

inline bool is_choice(ScalarType dtype) {
  return (is_summed(dtype) && !is_weighted(dtype)) || dtype == ScalarType::UInt16 ||
         dtype == ScalarType::UInt32;
}

// selection: integers [N] or [N, k], a branch or -1 each, or bool [N, B].
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& selection, int64_t num_branches) {
  const char* op = "route";
  const Operand chosen(selection);
  const bool mask = chosen.dtype == ScalarType::Bool;
  if (!mask && !is_choice(chosen.dtype)) {
    refuse(op, ": selection must be bool or integer but uint64; got ", told(chosen));
  }
  if (num_branches < 1 || num_branches > kMostBranches) {
    refuse(op, ": num_branches must be in 1..", kMostBranches, "; got ", num_branches);
  }
  if (mask && (chosen.dims() != 2 || chosen.sizes[1] != num_branches)) {
    refuse(op, ": a bool selection must be [N, ", num_branches, "]; got ", told(chosen));
  }
  if ((chosen.dims() != 1 && chosen.dims() != 2) || (chosen.dims() == 2 && chosen.sizes[1] < 1)) {
    refuse(op, ": selection must be [N] or [N, k>=1]; got ", told(chosen));
  }
  const int64_t rows = chosen.rows(), ranks = chosen.dims() == 2 ? chosen.sizes[1] : 1;
  const int64_t entries = rows * ranks;
  if (entries > kMostEntries) {
    refuse(op, ": at most ", kMostEntries, " entries are sorted; got ", told(chosen));
  }

  const Backend backend(chosen.device);
  const bool narrow = mask || chosen.dtype == ScalarType::Int || chosen.dtype == ScalarType::Long;
  const Tensor values =
      narrow ? as_contiguous(chosen)
             : torch::stable::contiguous(torch::stable::to(selection, ScalarType::Long));
  const PlanTensors plan(chosen.device, rows, ranks, num_branches);
  const auto branches = static_cast<int>(num_branches);
  if (mask) {
    plan.fill(backend, entries, Mask{data_of<bool>(values), branches});
  } else if (chosen.dtype == ScalarType::Int) {
    plan.fill(backend, entries, Choice<int32_t>{data_of<int32_t>(values), branches});
  } else {
    plan.fill(backend, entries, Choice<int64_t>{data_of<int64_t>(values), branches});
  }
  return {plan.order, plan.inverse, plan.header};
}

// logits: floating [N, B]. Also returns choice int64 [N]; faulty rows choose -1.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> route_argmax(const Tensor& logits) {
  const char* op = "route_argmax";
  const Operand scores(logits);
  if (!is_floating(scores.dtype) || scores.dims() != 2 || scores.sizes[1] < 1) {
    refuse(op, ": logits must be float64, float32, float16 or bfloat16 [N, B>=1]; got ",
           told(scores));
  }
  const int64_t rows = scores.rows(), branches = scores.sizes[1];
  if (branches > kMostBranches) {
    refuse(op, ": at most ", kMostBranches, " branches; got ", told(scores));
  }
  if (rows > kMostEntries) {
    refuse(op, ": at most ", kMostEntries, " entries are sorted; got ", told(scores));
  }

  const Backend backend(scores.device);
  const Tensor values = as_contiguous(scores);
  const Tensor choice = empty_vector(scores.device, rows, ScalarType::Long);
  const PlanTensors plan(scores.device, rows, 1, branches);
  visit_weighted(scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    plan.fill(backend, rows,
              Argmax<T>{data_of<T>(values), static_cast<int64_t*>(choice.mutable_data_ptr()),
                        static_cast<int>(branches)});
  });
  return {choice, plan.order, plan.inverse, plan.header};
}

}  // namespace dynmm
