// The block programs of csrc/cuda/segment_sums.h on the executor, against sums that are written out plainly.
#include "../../csrc/cuda/segment_sums.h"

#include <math.h>

#include <map>

#include "checks.h"
#include "cuda_executor.h"

using namespace vqkernels;
using namespace vqkernels::cuda;

namespace {

constexpr int kMasked = -1, kPoisoned = -2;  // fates of rows, beside the indices

// One call: z (batch, head, position, channel) in a layout of its own, indices, mask, and what a launcher would hand
// out.
struct Case {
  int64_t batch = 1, heads = 1, positions = 0, channels = 1, codes = 1;
  DType type = DType::f32, code_type = DType::f32, out_type = DType::f32;
  bool channels_first = false, gradient = false, integers = false;
  double grad = -0.75;
  uint32_t seed = 0;
  std::function<int(int64_t)> fate;  // of a flat row: an index, kMasked, kPoisoned

  std::vector<uint8_t> z, codebook, sums;
  std::vector<int64_t> indices, counts;
  std::vector<uint8_t> mask;
  std::vector<uint8_t> memory;  // the workspace
  int64_t elements = 1000;

  int64_t total() const { return batch * heads * positions; }
  int64_t groups() const { return heads * codes; }

  Rows rows() const {
    const int64_t d = channels, p = positions;
    if (channels_first) return {z.data(), type, batch, heads, p, d, heads * d * p, d * p, 1, p};
    return {z.data(), type, batch, heads, p, d, p * heads * d, d, heads * d, 1};
  }
  PerRow per_row(const void* data) const { return {data, heads * positions, positions, 1}; }
  Codes codes_view() const { return {gradient ? codebook.data() : nullptr, code_type, codes * channels, channels, 1}; }
  int64_t at(int64_t flat, int64_t d) const {
    return offset_of(rows(), place_of(rows(), uint32_t(flat))) + d * rows().channel_stride;
  }

  void fill() {
    std::mt19937 random(11);
    z.resize(total() * channels * size_of(type));
    codebook.resize(groups() * channels * size_of(code_type));
    indices.assign(total(), -1);
    mask.assign(total(), 1);
    const auto draw = [&] {
      const double fraction = ldexp(double(random()), -32) + ldexp(double(random()), -64);  // every bit of a double
      return integers ? double(int(random() % 15)) - 7.0 : (fraction - 0.5) * exp2(random() % 9);
    };
    for (int64_t i = 0; i < groups() * channels; ++i) store_double(codebook.data(), code_type, i, draw());
    for (int64_t flat = 0; flat < total(); ++flat) {
      const Place place = place_of(rows(), uint32_t(flat));
      const int64_t one = offset_of(per_row(nullptr), place);
      const int what = fate(flat);
      for (int64_t d = 0; d < channels; ++d) store_double(z.data(), type, at(flat, d), what == kMasked ? NAN : draw());
      if (what == kPoisoned) store_double(z.data(), type, at(flat, channels - 1), flat % 2 ? NAN : -INFINITY);
      indices[one] = what == kMasked || what == kPoisoned ? 0 : what;
      if (what == kMasked) mask[one] = 0;
    }
  }

  void run() {
    fill();
    counts.assign(groups(), -1);
    sums.assign(groups() * channels * size_of(out_type), 0xff);
    const SegmentSums what = {rows(),
                              per_row(indices.data()),
                              per_row(mask.data()),
                              codes,
                              codes_view(),
                              gradient ? &grad : nullptr,
                              DType::f64,
                              &elements,
                              counts.data(),
                              sums.data(),
                              out_type};
    const SumWorkspace plan = plan_sums(total(), groups(), channels, 0);
    memory.assign(plan.bytes, 0xff);  // NaN as double
    executor::Launcher launcher{seed};
    require(launch_segment_sums(launcher, what, memory.data(), plan, 0) == 0, "an error");
  }

  // The rows of a code, ascending, told from the fates alone.
  std::vector<std::vector<int64_t>> expected_rows() const {
    std::vector<std::vector<int64_t>> found(groups());
    for (int64_t flat = 0; flat < total(); ++flat)
      if (const int what = fate(flat); what >= 0 && what < codes)
        found[place_of(rows(), uint32_t(flat)).head * codes + what].push_back(flat);
    return found;
  }

  double term(int64_t group, int64_t flat, int64_t d) const {
    const double x = load_double(z.data(), type, at(flat, d));
    return gradient ? load_double(codebook.data(), code_type, group * channels + d) - x : x;
  }

  // Adds the terms of a code in the order that segments.h promises, found without its functions.
  double ordered_sum(const std::vector<int64_t>& members, int64_t first, int64_t group, int64_t d) const {
    std::map<int64_t, double> chunk;
    for (size_t i = 0; i < members.size(); ++i) chunk[(first + int64_t(i)) / 128] += term(group, members[i], d);
    std::vector<double> parts;
    for (const auto& [number, sum] : chunk) parts.push_back(sum);
    const size_t count = parts.size(), share = (count + 15) / 16;
    double total = 0.0;
    if (count <= 64) {
      for (double part : parts) total += part;
    } else {
      for (size_t from = 0; from < 16 * share; from += share) {
        double one = 0.0;
        for (size_t i = from; i < std::min(from + share, count); ++i) one += parts[i];
        total += one;
      }
    }
    return total;
  }

  void verify() {
    run();
    const auto expected = expected_rows();
    const double factor = gradient ? 2.0 * grad / double(elements) : 1.0;
    int64_t first = 0;
    for (int64_t group = 0; group < groups(); ++group) {
      const auto& members = expected[group];
      const std::string name = "code " + std::to_string(group) + " of " + std::to_string(groups());
      require(counts[group] == int64_t(members.size()),
              name + " counts " + std::to_string(counts[group]) + " rows instead of " + std::to_string(members.size()));
      for (int64_t d = 0; d < channels; ++d) {
        double plain = 0.0;
        for (int64_t flat : members) plain += term(group, flat, d);
        const double exact = integers ? plain : ordered_sum(members, first, group, d);
        uint8_t wanted[8];
        store_double(wanted, out_type, 0, members.empty() ? 0.0 : factor * exact);
        const double found = load_double(sums.data(), out_type, group * channels + d);
        require(memcmp(wanted, sums.data() + (group * channels + d) * size_of(out_type), size_of(out_type)) == 0,
                name + ", channel " + std::to_string(d) + ": " + std::to_string(found) + " instead of " +
                    std::to_string(load_double(wanted, out_type, 0)));
      }
      first += int64_t(members.size());
    }
  }
};

Case of(int64_t positions, int64_t channels, int64_t codes, std::function<int(int64_t)> fate) {
  Case made;
  made.positions = positions, made.channels = channels, made.codes = codes, made.fate = std::move(fate);
  return made;
}

int mixed(int64_t flat, int64_t codes) { return int((flat * 2654435761u >> 7) % codes); }

}  // namespace

int main() {
  check("whole_segments", [] { of(300, 5, 40, [](int64_t i) { return mixed(i, 40); }).verify(); });
  check("segments_over_chunk_ends", [] {
    for (int64_t positions : {127, 128, 129, 255, 256, 257, 700})
      for (int64_t codes : {2, 3, 7}) of(positions, 3, codes, [=](int64_t i) { return mixed(i, codes); }).verify();
  });
  check("a_segment_that_ends_with_its_chunk", [] {
    for (int64_t head : {127, 128, 129, 256})
      of(512, 4, 3, [=](int64_t i) { return i < head ? 0 : i < 384 ? 1 : 2; }).verify();
  });
  check("partials_are_added_in_chunk_order", [] {
    for (int64_t positions : {1500, 9300}) {
      Case one = of(positions, 4, 3, [](int64_t i) { return i % 50 == 0 ? 0 : i % 50 == 5 ? 2 : 1; });
      one.type = one.out_type = DType::f64;  // float32 would round the order away
      one.verify();
    }
  });
  check("one_huge_segment", [] {
    of(9300, 3, 5, [](int64_t i) { return i == 77 ? 1 : 3; }).verify();
    Case narrow = of(8200, 40, 1, [](int64_t) { return 0; });
    narrow.type = DType::bf16;
    narrow.verify();
  });
  check("codes_without_rows_get_zeros", [] {
    of(50, 3, 300, [](int64_t i) { return i % 2 ? 290 : 17; }).verify();
    Case infinite = of(40, 3, 9, [](int64_t) { return 4; });
    infinite.gradient = true, infinite.grad = INFINITY;
    infinite.run();
    for (int64_t i = 0; i < 27; ++i)
      require((load_double(infinite.sums.data(), infinite.out_type, i) == 0.0) == (i / 3 != 4), "an infinite factor");
  });
  check("masked_poisoned_and_outside_rows_give_nothing", [] {
    const auto fate = [](int64_t i) {
      return i % 5 == 0 ? kMasked : i % 7 == 0 ? kPoisoned : i % 11 == 0 ? 1000 : i % 13 == 0 ? -9 : mixed(i, 6);
    };
    of(600, 9, 6, fate).verify();
    Case all = of(200, 2, 3, [](int64_t i) { return i % 2 ? kMasked : kPoisoned; });
    all.verify();
  });
  check("no_rows", [] { of(0, 3, 4, [](int64_t) { return 0; }).verify(); });
  check("one_row_one_code_one_channel", [] { of(1, 1, 1, [](int64_t) { return 0; }).verify(); });
  check("heads_and_batches_in_both_layouts", [] {
    for (bool first : {false, true}) {
      Case one = of(70, 6, 5, [](int64_t i) { return i % 9 == 0 ? kMasked : mixed(i, 5); });
      one.batch = 3, one.heads = 2, one.channels_first = first;
      one.verify();
    }
  });
  check("every_type_alone_and_in_packets", [] {
    for (DType type : {DType::f32, DType::bf16, DType::f16, DType::f64})
      for (int64_t channels : {3, 24}) {
        Case one = of(200, channels, 5, [](int64_t i) { return i % 50 == 3 ? kPoisoned : mixed(i, 5); });
        one.type = type, one.out_type = type == DType::f64 ? DType::f64 : DType::f32;
        one.verify();
      }
  });
  check("more_channels_than_a_block_has_lanes", [] {
    for (int64_t channels : {130, 1030}) {
      Case wide = of(150, channels, 2, [](int64_t i) { return mixed(i, 2); });
      wide.verify();
    }
  });
  check("the_codebook_gradient", [] {
    for (DType type : {DType::f32, DType::bf16, DType::f64}) {
      Case one = of(400, 5, 4, [](int64_t i) { return i % 50 == 3 ? kPoisoned : mixed(i, 3); });
      one.heads = 2, one.gradient = true, one.code_type = one.out_type = type;
      one.verify();
    }
  });
  check("integers_sum_exactly_whatever_the_order", [] {
    Case one = of(1000, 4, 3, [](int64_t i) { return mixed(i, 3); });
    one.integers = true;
    one.verify();
  });
  check("the_order_of_threads_changes_nothing", [] {
    for (uint32_t seed : {1, 2, 3}) {
      Case one = of(9000, 2, 4, [](int64_t i) { return i % 99 == 0 ? kPoisoned : i % 3 == 0 ? mixed(i, 4) : 2; });
      one.seed = seed;
      one.verify();
    }
  });
  check("the_workspace_holds_every_part_apart", [] {
    for (int64_t total : {int64_t(0), int64_t(1), int64_t(1000), (int64_t(1) << 31) - 1})
      for (int64_t channels : {1, 64}) {
        const SumWorkspace plan = plan_sums(total, 777, channels, 5000);
        const int64_t rows = total * 4, partials = 2 * ((total + 127) / 128) * channels * 8;
        std::map<int64_t, int64_t> parts;
        for (int64_t i = 0; i < 2; ++i) {
          if (total > 0) parts[plan.keys[i]] = rows, parts[plan.order[i]] = rows;
        }
        parts[plan.start] = 778 * 4;
        if (total > 0) parts[plan.partials] = partials;
        parts[plan.sort] = 5000;
        require(parts.size() == (total > 0 ? 7u : 2u), "two parts begin at one place");
        int64_t end = 0;
        for (const auto& [at, bytes] : parts) {
          require(at >= end && at % 256 == 0, "parts overlap or are not aligned");
          end = at + bytes;
        }
        require(end <= plan.bytes, "the workspace is too small");
      }
  });
  check("keys_have_as_many_bits_as_they_need", [] {
    require(key_bits(1) == 1 && key_bits(2) == 2 && key_bits(255) == 8 && key_bits(256) == 9, "a wrong number of bits");
    require(key_bits((int64_t(1) << 31) - 1) == 31, "a wrong number of bits");
    require(fits_sums((int64_t(1) << 31) - 1, 5) && !fits_sums(int64_t(1) << 31, 5) && !fits_sums(5, int64_t(1) << 31),
            "what fits 31 bits");
  });
  check("offsets_pass_two_to_the_31", [] {
    const Rows far = {nullptr, DType::f32, 4, 2, 300000, 4096, int64_t(1) << 33, int64_t(1) << 31, 4096, 1};
    const Place place = place_of(far, 1200000u + 2 * 300000u + 299999u);
    require(place.head == 1 && place.batch == 2 && place.position == 299999, "a wrong place");
    require(offset_of(far, place) == (int64_t(1) << 34) + (int64_t(1) << 31) + int64_t(299999) * 4096,
            "a wrong offset");
  });
  return 0;
}
