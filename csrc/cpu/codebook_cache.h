// Packed codebooks kept between calls, so that a codebook that does not change is packed once.
//
// An entry is found by the codebook's address and shape and used only if every byte still equals the copy that was
// packed, so nothing that changes a codebook, by whatever way, can make an entry wrong; a changed codebook takes the
// place of its old entry. Comparing costs a read of the codebook, a small part of what a search of it costs.
#pragma once
#include <memory>
#include <mutex>

#include "codebook16.h"

namespace vqkernels {

// A codebook in all the forms that a search needs, with the bytes it was made from.
class SearchCodebook {
 public:
  SearchCodebook(const Codes& codes, DType rows, Metric metric, bool certified, const Sweep& sweep);

  bool made_from(const Codes& codes, DType rows, Metric metric, bool certified, const Sweep& sweep) const;
  int64_t bytes() const { return int64_t(copy_.size()); }
  const PackedCodebook& packed() const { return packed_; }

  // The integer codebook for rows of this norm (IntegerCodebook); the latest is kept.
  std::shared_ptr<const IntegerCodebook> integers(double row_norm, const Parallel& parallel) const;

 private:
  const std::vector<char> copy_;
  const PackedCodebook packed_;  // of the copy
  const bool certified_, narrow_;
  mutable std::mutex mutex_;
  mutable double row_norm_ = 0.0;
  mutable std::shared_ptr<const IntegerCodebook> integers_;
};

// From the cache, or made and put there.
std::shared_ptr<const SearchCodebook> search_codebook(const Codes& codes, DType rows, Metric metric, bool certified,
                                                      const Sweep& sweep);

}  // namespace vqkernels
