// The floating-point environment that the proofs assume: round to nearest, subnormals kept.
//
// A process may flush subnormals to zero (torch.set_flush_denormal) or round otherwise; a kernel holds this guard while
// it computes and leaves the thread as it found it.
#pragma once
#include <fenv.h>

namespace vqkernels {

class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  fenv_t before_;
};

}  // namespace vqkernels
