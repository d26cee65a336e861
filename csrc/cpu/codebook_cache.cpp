#include "codebook_cache.h"

#include <string.h>

#include <list>

namespace vqkernels {
namespace {

constexpr size_t kMostEntries = 64;       // a residual stack has one per level
constexpr int64_t kMostBytes = 64 << 20;  // of codebooks; their packed forms take about three times as much

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

std::vector<char> bytes_of(const Codes& codes) {
  const char* begin = static_cast<const char*>(codes.data);
  return std::vector<char>(begin, begin + codes.size * codes.channels * size_of(codes.dtype));
}

Codes at(const Codes& codes, const std::vector<char>& copy) {
  return {copy.data(), codes.dtype, codes.size, codes.channels};
}

struct Entry {
  const void* address;
  std::shared_ptr<const SearchCodebook> codebook;
};

std::mutex cache_mutex;
std::list<Entry>& cache() {
  static std::list<Entry>* entries = new std::list<Entry>;  // never destroyed: threads may outlive the exit handlers
  return *entries;
}

}  // namespace

SearchCodebook::SearchCodebook(const Codes& codes, DType rows, Metric metric, bool certified, const Sweep& sweep)
    : copy_(bytes_of(codes)),
      packed_(at(codes, copy_), rows, metric, certified, sweep),
      certified_(certified),
      narrow_(rows != DType::f64) {}

bool SearchCodebook::made_from(const Codes& codes, DType rows, Metric metric, bool certified,
                               const Sweep& sweep) const {
  const Codes& source = packed_.source;
  return source.dtype == codes.dtype && source.size == codes.size && source.channels == codes.channels &&
         narrow_ == (rows != DType::f64) && packed_.metric == metric && certified_ == certified &&
         &packed_.sweep == &sweep && memcmp(copy_.data(), codes.data, copy_.size()) == 0;
}

std::shared_ptr<const IntegerCodebook> SearchCodebook::integers(double row_norm, const Parallel& parallel) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (integers_ == nullptr || row_norm_ != row_norm) {  // a NaN, "do not pack", is never equal, and costs nothing
    integers_ = std::make_shared<const IntegerCodebook>(packed_, row_norm, parallel);
    row_norm_ = row_norm;
  }
  return integers_;
}

std::shared_ptr<const SearchCodebook> search_codebook(const Codes& codes, DType rows, Metric metric, bool certified,
                                                      const Sweep& sweep) {
  const auto same_place = [&](const Entry& entry) {
    const Codes& source = entry.codebook->packed().source;
    return entry.address == codes.data && source.size == codes.size && source.channels == codes.channels;
  };
  {
    const std::lock_guard<std::mutex> lock(cache_mutex);
    for (auto entry = cache().begin(); entry != cache().end(); ++entry) {
      if (!same_place(*entry) || !entry->codebook->made_from(codes, rows, metric, certified, sweep)) continue;
      cache().splice(cache().begin(), cache(), entry);
      return entry->codebook;
    }
  }
  auto made = std::make_shared<const SearchCodebook>(codes, rows, metric, certified, sweep);
  if (made->bytes() > kMostBytes) return made;
  const std::lock_guard<std::mutex> lock(cache_mutex);
  cache().remove_if(same_place);
  cache().push_front({codes.data, made});
  int64_t bytes = 0;
  for (const Entry& entry : cache()) bytes += entry.codebook->bytes();
  while (cache().size() > kMostEntries || bytes > kMostBytes) {
    bytes -= cache().back().codebook->bytes();
    cache().pop_back();
  }
  return made;
}

}  // namespace vqkernels
