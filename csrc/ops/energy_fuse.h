#pragma once

#include <initializer_list>
#include <tuple>

#include "maps.h"
#include "ops/refusals.h"

namespace dynmm {

constexpr int kMostModalities = 8;

// Where the weights come from, in the order of ops/checks.py.
enum Weighting : int { kEnergy, kSoftmax, kUniform, kGiven };

// The logits of M modalities, [N, C] each, and what weighs and judges them, as kernels see them.
template <class T>
struct Judged {
  using A = Accumulator<T>;

  Maps<const T> logits[kMostModalities];
  const int64_t* named;  // [N]: the class of each sample, whatever its value; or null
  const A* labels;       // [N, C]; or null. At most one of the two is given
  const bool* present;   // [N, M]; or null: all are
  const A* weights;      // [N, M], of kGiven; or null
  int64_t rows, classes;
  int modalities;
  Weighting weighting;
  A scale;
};

template <class T>
struct Fused {
  using A = Accumulator<T>;

  T* fused;       // [N, C]
  A* confidence;  // [N, M]
  A* losses;      // [N, M + 1]; or null: there are no targets
  A* energies;    // [N, M + 1]
};

template <class T>
struct Incoming {
  using A = Accumulator<T>;

  const A* energies;    // [N, M + 1]
  Maps<const T> fused;  // [N, C]; or a null base: zeros
  const A* confidence;  // [N, M]; or null: zeros
  const A* losses;      // [N, M + 1]; or null: zeros
  bool detach;
};

template <class T>
struct Outgoing {
  T* logits[kMostModalities];  // [N, C] each
  Accumulator<T>* weights;     // [N, M], of kGiven; or null
};

// The arguments that both ops have, checked; then brought to where kernels read them. What had to
// be copied lives as long as this.
class EnergyCall {
 public:
  EnergyCall(const char* op, const std::vector<Tensor>& logits,
             const std::optional<Tensor>& targets, const std::optional<Tensor>& present,
             const std::optional<Tensor>& weights, int64_t weighting)
      : op_(op),
        logits_(logits.begin(), logits.end()),
        targets_(operand(targets)),
        present_(operand(present)),
        weights_(operand(weights)) {
    const auto modalities = static_cast<int64_t>(logits_.size());
    if (modalities < 1 || modalities > kMostModalities) {
      refuse(op, ": wanted the logits of 1..", kMostModalities, " modalities; got ", modalities);
    }
    for (const Operand& t : logits_) check_device(op, t, "logits 0", first().device);
    for (const auto* t : {&targets_, &present_, &weights_}) together(*t);
    if (!is_floating(first().dtype) || first().dims() != 2 || first().sizes[1] < 1) {
      refuse(op, ": logits 0 must be float64, float32, float16 or bfloat16 [N, C>=1]; got ",
             told(first()));
    }
    for (size_t m = 0; m < logits_.size(); ++m) {
      if (same_rows(logits_[m], first()) && logits_[m].rows() == rows()) continue;
      refuse(op, ": logits ", m, " must be like logits 0, ", told(first()), "; got ",
             told(logits_[m]));
    }
    if (targets_ && !is(*targets_, ScalarType::Long, {rows()}) &&
        !is(*targets_, dtype(), {rows(), classes()})) {
      refuse(op, ": targets must be int64 [", rows(), "] or ", name_of(dtype()), " [", rows(), ", ",
             classes(), "]; got ", told(*targets_));
    }
    check_is("present", present_, ScalarType::Bool, modalities);
    if (weighting < 0 || weighting > kGiven) {
      refuse(op, ": weighting must be in 0..", int{kGiven}, "; got ", weighting);
    }
    if (weights_.has_value() != (weighting == kGiven)) {
      refuse(op, ": weights must come with weighting ", int{kGiven}, ", and with no other");
    }
    check_is("weights", weights_, dtype(), modalities);
    weighting_ = static_cast<Weighting>(weighting);
  }

  static std::optional<Operand> operand(const std::optional<Tensor>& t) {
    return t ? std::optional<Operand>(*t) : std::nullopt;
  }

  const Operand& first() const { return logits_[0]; }
  int64_t rows() const { return first().sizes[0]; }
  int64_t classes() const { return first().sizes[1]; }
  int64_t modalities() const { return static_cast<int64_t>(logits_.size()); }
  bool has_targets() const { return targets_.has_value(); }
  ScalarType dtype() const { return weight_dtype(first().dtype); }

  void together(const std::optional<Operand>& t) const {
    if (t) check_device(op_, *t, "logits 0", first().device);
  }

  void check_is(const char* name, const std::optional<Operand>& t, ScalarType dtype,
                int64_t columns) const {
    if (!t || is(*t, dtype, {rows(), columns})) return;
    const int64_t wanted[] = {rows(), columns};
    refuse(op_, ": ", name, " must be ", name_of(dtype), " ", list_of(wanted), "; got ", told(*t));
  }

  // Uninitialised, [N, columns].
  Tensor sums(int64_t columns) const {
    return empty_matrix(first().device, rows(), columns, dtype());
  }
  Tensor like_logits() const {
    return empty_matrix(first().device, rows(), classes(), first().dtype);
  }

  // Read where they lie if the classes of a sample do so side by side.
  template <class T>
  Maps<const T> table(const Operand& t) {
    const Blocks blocks = copies_.blocks_of(t, RowLayout(t));
    return {reinterpret_cast<const T*>(blocks.base),
            blocks.stride / static_cast<int64_t>(sizeof(T))};
  }

  template <class V>
  const V* contiguous(const std::optional<Operand>& t) {
    if (!t) return nullptr;
    kept_.push_back(as_contiguous(*t));
    return data_of<V>(kept_.back());
  }

  template <class T>
  Judged<T> judged(double scale) {
    using A = Accumulator<T>;
    Judged<T> call{};
    for (size_t m = 0; m < logits_.size(); ++m) call.logits[m] = table<T>(logits_[m]);
    if (targets_ && targets_->dtype == ScalarType::Long) {
      call.named = contiguous<int64_t>(targets_);
    } else {
      call.labels = contiguous<A>(targets_);
    }
    call.present = contiguous<bool>(present_);
    call.weights = contiguous<A>(weights_);
    call.rows = rows();
    call.classes = classes();
    call.modalities = static_cast<int>(modalities());
    call.weighting = weighting_;
    call.scale = static_cast<A>(scale);
    return call;
  }

 private:
  static bool is(const Operand& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    return t.dtype == dtype &&
           std::equal(t.sizes.begin(), t.sizes.end(), sizes.begin(), sizes.end());
  }

  const char* op_;
  std::vector<Operand> logits_;
  std::optional<Operand> targets_, present_, weights_;
  Weighting weighting_;
  Copies copies_{true};
  std::vector<Tensor> kept_;
};

template <class T>
T* writable(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// energy_fuse: fused, confidence, losses and energies of M logits.
//
// Backend: fuse<T>(Judged<T>, Fused<T>), at least one row.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> energy_fuse(std::vector<Tensor> logits,
                                                       std::optional<Tensor> targets,
                                                       std::optional<Tensor> present,
                                                       std::optional<Tensor> weights,
                                                       int64_t weighting, double scale) {
  EnergyCall call("energy_fuse", logits, targets, present, weights, weighting);
  const Backend backend(call.first().device);
  const int64_t modalities = call.modalities();
  const Tensor fused = call.like_logits(), confidence = call.sums(modalities);
  const Tensor losses = call.sums(call.has_targets() ? modalities + 1 : 0);
  const Tensor energies = call.sums(modalities + 1);
  if (call.rows() == 0) return {fused, confidence, losses, energies};
  visit_weighted(call.first().dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    backend.template fuse<T>(
        call.template judged<T>(scale),
        {writable<T>(fused), writable<A>(confidence),
         call.has_targets() ? writable<A>(losses) : nullptr, writable<A>(energies)});
  });
  return {fused, confidence, losses, energies};
}

// energy_fuse_grads: the gradients of the logits, and of weights that are given.
//
// Backend: grads<T>(Judged<T>, Incoming<T>, Outgoing<T>), at least one row.
template <class Backend>
std::tuple<std::vector<Tensor>, Tensor> energy_fuse_grads(
    std::vector<Tensor> logits, std::optional<Tensor> targets, std::optional<Tensor> present,
    std::optional<Tensor> weights, int64_t weighting, double scale, bool detach,
    const Tensor& energies, std::optional<Tensor> grad_fused, std::optional<Tensor> grad_confidence,
    std::optional<Tensor> grad_losses) {
  const char* op = "energy_fuse_grads";
  EnergyCall call(op, logits, targets, present, weights, weighting);
  const int64_t modalities = call.modalities();
  const std::optional<Operand> of_energies(energies),
      of_fused = EnergyCall::operand(grad_fused),
      of_confidence = EnergyCall::operand(grad_confidence),
      of_losses = EnergyCall::operand(grad_losses);
  for (const auto* t : {&of_energies, &of_fused, &of_confidence, &of_losses}) call.together(*t);
  call.check_is("energies", of_energies, call.dtype(), modalities + 1);
  call.check_is("grad_fused", of_fused, call.first().dtype, call.classes());
  call.check_is("grad_confidence", of_confidence, call.dtype(), modalities);
  if (of_losses && !call.has_targets()) {
    refuse(op, ": grad_losses must come with targets; got none");
  }
  call.check_is("grad_losses", of_losses, call.dtype(), modalities + 1);

  const Backend backend(call.first().device);
  std::vector<Tensor> of_logits;
  for (int64_t m = 0; m < modalities; ++m) of_logits.push_back(call.like_logits());
  const Tensor of_weights = call.sums(weighting == kGiven ? modalities : 0);
  if (call.rows() == 0) return {of_logits, of_weights};
  visit_weighted(call.first().dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Incoming<T> incoming{call.template contiguous<A>(of_energies),
                               of_fused ? call.template table<T>(*of_fused) : Maps<const T>{},
                               call.template contiguous<A>(of_confidence),
                               call.template contiguous<A>(of_losses), detach};
    Outgoing<T> outgoing{};
    for (int64_t m = 0; m < modalities; ++m) outgoing.logits[m] = writable<T>(of_logits[m]);
    if (weighting == kGiven) outgoing.weights = writable<A>(of_weights);
    backend.template grads<T>(call.template judged<T>(scale), incoming, outgoing);
  });
  return {of_logits, of_weights};
}

}  // namespace dynmm
