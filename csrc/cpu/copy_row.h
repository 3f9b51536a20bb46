#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dynmm {

template <size_t kBytes>
using Bytes = std::integral_constant<size_t, kBytes>;

// A size of at least one word of kBytes; the last word reaches back over what is already there.
template <size_t kBytes>
struct Words {
  size_t bytes;
};

template <size_t kBytes>
void copy_row(const char* from, char* to, Bytes<kBytes>) {
  std::memcpy(to, from, kBytes);
}

template <size_t kBytes>
void copy_row(const char* from, char* to, Words<kBytes> row) {
  const size_t last = row.bytes - kBytes;
  for (size_t at = 0; at < last; at += kBytes) std::memcpy(to + at, from + at, kBytes);
  std::memcpy(to + last, from + last, kBytes);
}

inline void copy_row(const char* from, char* to, size_t bytes) { std::memcpy(to, from, bytes); }

// Calls f(size) with what copy_row takes: for rows of few bytes a size that the compiler knows, or
// words, where a call of memcpy would cost more than the row.
template <class F>
void visit_size(int64_t row_bytes, const F& f) {
  const auto bytes = static_cast<size_t>(row_bytes);
  switch (bytes) {
    case 1:
      return f(Bytes<1>{});
    case 2:
      return f(Bytes<2>{});
    case 4:
      return f(Bytes<4>{});
    case 8:
      return f(Bytes<8>{});
    case 16:
      return f(Bytes<16>{});
    case 32:
      return f(Bytes<32>{});
    case 64:
      return f(Bytes<64>{});
  }
  if (bytes > 64 || bytes == 0) return f(bytes);
  if (bytes > 16) return f(Words<16>{bytes});
  if (bytes > 8) return f(Words<8>{bytes});
  if (bytes > 4) return f(Words<4>{bytes});
  return f(Words<2>{bytes});
}

}  // namespace dynmm
