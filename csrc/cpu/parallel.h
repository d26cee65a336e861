// How a kernel is given threads: f(first, last) over [0, count) in pieces, in any order.
#pragma once
#include <stdint.h>

#include <functional>

namespace vqkernels {

using Parallel = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

}  // namespace vqkernels
