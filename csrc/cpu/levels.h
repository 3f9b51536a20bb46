#pragma once

#include <cstdlib>
#include <cstring>

namespace dynmm {

// The instruction sets for which some loops are compiled: what every processor has, and more.
enum class Level { kBaseline, kAvx2, kAvx512 };

inline Level best_level() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return Level::kBaseline;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Level::kAvx512 : Level::kAvx2;
#else
  return Level::kBaseline;
#endif
}

// The best one this processor has, or a lesser one by DYNMM_CPU_LEVEL; tests compare their bits.
inline const Level kLevel = [] {
  const Level best = best_level();
  const char* asked = std::getenv("DYNMM_CPU_LEVEL");
  if (asked == nullptr) return best;
  if (std::strcmp(asked, "baseline") == 0) return Level::kBaseline;
  if (std::strcmp(asked, "avx2") == 0 && best != Level::kBaseline) return Level::kAvx2;
  return best;
}();

}  // namespace dynmm
