// Reading one code or one row in double, whatever its type.
#pragma once
#include "rows.h"

namespace vqkernels {

// Calls f(d, value) for every channel of a code.
template <class F> void read_code(const Codes& codes, int64_t k, const F& f) {
  with_type(codes.dtype, [&](auto* type) {
    const auto* code = static_cast<decltype(type)>(codes.data) + k * codes.channels;
    for (int64_t d = 0; d < codes.channels; ++d) f(d, double(widen(code[d])));
  });
}

// Calls f(d, value) for every channel of a row.
template <class F> void read_row(const Rows& rows, int64_t row, const F& f) {
  with_type(rows.dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(rows.data) + rows.offset(row);
    for (int64_t d = 0; d < rows.channels; ++d) f(d, double(widen(x[d * rows.channel_stride])));
  });
}

}  // namespace vqkernels
