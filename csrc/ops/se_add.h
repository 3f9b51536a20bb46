#pragma once

#include <tuple>

#include "maps.h"
#include "ops/refusals.h"

namespace dynmm {

inline void check_maps(const char* op, const char* name, const Operand& t) {
  if (is_floating(t.dtype) && t.dims() >= 2) return;
  refuse(op, ": ", name, " must be float64, float32, float16 or bfloat16 [N, C, ...]; got ",
         told(t));
}

inline void check_like(const char* op, const char* name, const Operand& t, const char* other,
                       const Operand& wanted) {
  if (same_rows(t, wanted)) return;
  refuse(op, ": ", name, " must be like ", other, ", ", told(wanted), "; got ", told(t));
}

// The factors of maps, or what is added to them: [n, C], contiguous.
inline Tensor factors(const char* op, const char* name, const Operand& t, const Operand& maps,
                      int64_t active) {
  const ScalarType dtype = weight_dtype(maps.dtype);
  const int64_t wanted[] = {active, maps.sizes[1]};
  if (t.dtype != dtype || !std::equal(t.sizes.begin(), t.sizes.end(), wanted, wanted + 2)) {
    refuse(op, ": ", name, " must be ", name_of(dtype), " ", list_of(wanted), "; got ", told(t));
  }
  return as_contiguous(t);
}

// se_add: out = main_scale * main + aux_scale * aux on the first n samples, main behind them.
//
// Backend: add<T>(layout, main, aux, main_scale, aux_scale, rows, active, out).
template <class Backend>
Tensor se_add(const Tensor& main, const Tensor& aux, const Tensor& main_scale,
              const Tensor& aux_scale) {
  const char* op = "se_add";
  const Operand of_main(main), of_aux(aux), of_s(main_scale), of_t(aux_scale);
  for (const Operand* t : {&of_aux, &of_s, &of_t}) check_device(op, *t, "main", of_main.device);
  check_maps(op, "main", of_main);
  check_like(op, "aux", of_aux, "main", of_main);
  const int64_t rows = of_main.rows(), active = of_aux.rows();
  if (active > rows) {
    refuse(op, ": aux must have at most the ", rows, " rows of main; got ", told(of_aux));
  }
  const Backend backend(of_main.device);
  const Tensor s = factors(op, "main_scale", of_s, of_main, active);
  const Tensor t = factors(op, "aux_scale", of_t, of_main, active);
  const MapLayout layout(of_main);
  const Tensor out = layout.empty(of_main, rows);
  if (rows == 0 || layout.numel() == 0) return out;
  const Samples m(of_main, layout), a(of_aux, layout);
  visit_weighted(of_main.dtype, [&](auto zero) {
    backend.template add<decltype(zero)>(layout, m, a, s, t, rows, active, out);
  });
  return out;
}

// se_add_means: the mean of each channel of each sample.
//
// Backend: means<T>(layout, maps, means).
template <class Backend>
Tensor se_add_means(const Tensor& maps) {
  const Operand of_maps(maps);
  check_maps("se_add_means", "maps", of_maps);
  const Backend backend(of_maps.device);
  const MapLayout layout(of_maps);
  const Tensor means = layout.empty_sums(of_maps, of_maps.rows());
  const Samples m(of_maps, layout);
  visit_weighted(of_maps.dtype, [&](auto zero) {
    backend.template means<decltype(zero)>(layout, m, of_maps.rows(), means);
  });
  return means;
}

// se_add_dots: the inner products of each channel of grad with those of main and of aux, [n, C].
//
// Backend: dots<T>(layout, grad, main, aux, active, of_main, of_aux).
template <class Backend>
std::tuple<Tensor, Tensor> se_add_dots(const Tensor& grad, const Tensor& main, const Tensor& aux) {
  const char* op = "se_add_dots";
  const Operand of_grad(grad), of_main(main), of_aux(aux);
  for (const Operand* t : {&of_main, &of_aux}) check_device(op, *t, "grad", of_grad.device);
  check_maps(op, "grad", of_grad);
  check_like(op, "main", of_main, "grad", of_grad);
  check_like(op, "aux", of_aux, "grad", of_grad);
  const int64_t active = of_aux.rows();
  const auto check_rows = [&](const char* name, const Operand& t) {
    if (t.rows() >= active) return;
    refuse(op, ": ", name, " must have at least the ", active, " rows of aux; got ", told(t));
  };
  check_rows("grad", of_grad);
  check_rows("main", of_main);
  const Backend backend(of_grad.device);
  const MapLayout layout(of_grad);
  const Tensor with_main = layout.empty_sums(of_grad, active);
  const Tensor with_aux = layout.empty_sums(of_grad, active);
  const Samples g(of_grad, layout), m(of_main, layout), a(of_aux, layout);
  visit_weighted(of_grad.dtype, [&](auto zero) {
    backend.template dots<decltype(zero)>(layout, g, m, a, active, with_main, with_aux);
  });
  return {with_main, with_aux};
}

// se_add_grads: scale * grad + shift on the first n samples for both streams; for main also grad
// behind them.
//
// Backend: grads<T>(layout, grad, main_scale, aux_scale, main_shift, aux_shift, rows, active, main,
// aux).
template <class Backend>
std::tuple<Tensor, Tensor> se_add_grads(const Tensor& grad, const Tensor& main_scale,
                                        const Tensor& aux_scale, const Tensor& main_shift,
                                        const Tensor& aux_shift) {
  const char* op = "se_add_grads";
  const Operand of_grad(grad), of_s(main_scale), of_t(aux_scale), of_u(main_shift), of_v(aux_shift);
  for (const Operand* t : {&of_s, &of_t, &of_u, &of_v}) {
    check_device(op, *t, "grad", of_grad.device);
  }
  check_maps(op, "grad", of_grad);
  const int64_t rows = of_grad.rows(), active = of_s.dims() > 0 ? of_s.rows() : 0;
  const Backend backend(of_grad.device);
  const Tensor s = factors(op, "main_scale", of_s, of_grad, active);
  const Tensor t = factors(op, "aux_scale", of_t, of_grad, active);
  const Tensor u = factors(op, "main_shift", of_u, of_grad, active);
  const Tensor v = factors(op, "aux_shift", of_v, of_grad, active);
  if (active > rows) {
    refuse(op, ": main_scale must have at most the ", rows, " rows of grad; got ", told(of_s));
  }
  const MapLayout layout(of_grad);
  const Tensor main = layout.empty(of_grad, rows), aux = layout.empty(of_grad, active);
  if (rows == 0 || layout.numel() == 0) return {main, aux};
  const Samples g(of_grad, layout);
  visit_weighted(of_grad.dtype, [&](auto zero) {
    backend.template grads<decltype(zero)>(layout, g, s, t, u, v, rows, active, main, aux);
  });
  return {main, aux};
}

}  // namespace dynmm
