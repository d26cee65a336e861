// The rotation trick's gradient (Fifty et al. 2024) of one row: g <- |e|/|z| (g - 2 (g.w) w + 2 (g.q) u) with u =
// z/|z|, q = e/|e|, w = (u + q)/|u + q|, w = 0 where u and q are opposite. Specified by `rotate` of
// vqkernels/reference.py.
//
// Three walks over a row that lies in L1; nothing is written but g. Double throughout, rows scaled by powers of two so
// that no norm overflows or vanishes, and sums in a fixed order.
#pragma once
#include <stdint.h>

namespace vqkernels {

// z, e and g have `channels` elements; z and e are destroyed: they become u + q and u. Unchanged g where z or e is
// zero.
void rotate_gradient(double* z, double* e, double* g, int64_t channels);

}  // namespace vqkernels
