// The index maps of the candidate pass against the PTX ISA's tables and brute force.
#include "../../csrc/cuda/fragment.h"

#include <algorithm>
#include <random>
#include <set>

#include "../../csrc/cuda/search.h"
#include "checks.h"
#include "cuda_matrix.h"

using namespace vqkernels;
using namespace vqkernels::cuda;

namespace {

std::string at(int lane, int i) { return " of lane " + std::to_string(lane) + ", element " + std::to_string(i); }

// One warp multiplies 16 rows by 16 codes of 16 channels that ldmatrix fetched from swizzled shared memory.
void product_of_a_warp(int chunks, int step) {
  std::mt19937 random(7);
  float left[16][16], right[16][16];
  std::vector<uint16_t> stored[2];
  for (int side = 0; side < 2; ++side) {
    stored[side].assign(16 * chunks * 8, 0x7e00);  // NaN wherever nothing should be read
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) {
        const float x = float(int(random() % 17) - 8);
        (side ? right : left)[row][k] = x;
        Float16 narrowed;
        narrow(double(x), &narrowed);
        const int chunk = 2 * step + k / 8;
        stored[side][swizzled(row, chunk, chunks) * 8 + k % 8] = narrowed.bits;
      }
  }
  executor::launch(1, 1, 32, 2 * 16 * chunks * 16, 0, [&](executor::HostBlock& block) {
    const auto memory = block.shared<Chunk>(0);
    for (int i = block.thread(); i < 2 * 16 * chunks; i += 32) {
      Chunk chunk;
      memcpy(&chunk, stored[i >= 16 * chunks].data() + (i % (16 * chunks)) * 8, 16);
      memory.set(i, chunk);
    }
    block.sync();
    const int lane = block.thread();
    uint32_t a[4], b[4];
    load_matrices(block, memory, swizzled(a_address(lane).row, 2 * step + a_address(lane).column, chunks), a);
    load_matrices(block, memory, 16 * chunks + swizzled(b_address(lane).row, 2 * step + b_address(lane).column, chunks),
                  b);
    for (int n = 0; n < 2; ++n) {
      float sum[4] = {};
      multiply(block, sum, a, b[2 * n], b[2 * n + 1]);
      for (int i = 0; i < 4; ++i) {
        float expected = 0.0f;
        const Spot place = c_place(lane, i);
        for (int k = 0; k < 16; ++k) expected += left[place.row][k] * right[8 * n + place.column][k];
        require(sum[i] == expected, "a wrong sum" + at(lane, i));
      }
    }
  });
}

}  // namespace

int main() {
  check("fragments_are_those_of_the_isa", [] {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const Spot mine = a_place(lane, i / 2, i % 2);
        require(mine.row == isa::a(lane, i).row && mine.column == isa::a(lane, i).col, "A" + at(lane, i));
      }
      for (int i = 0; i < 4; ++i) {
        const Spot right = b_place(lane, i / 2, i % 2), sum = c_place(lane, i);
        require(right.row == isa::b(lane, i).row && right.column == isa::b(lane, i).col, "B" + at(lane, i));
        require(sum.row == isa::c(lane, i).row && sum.column == isa::c(lane, i).col, "C" + at(lane, i));
      }
    }
  });
  check("addresses_bring_the_fragments", [] {
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e) {
          // matrix r gives this lane element 2 (lane % 4) + e of the row that lane 8 r + lane / 4 points at
          const Spot left = a_address(8 * r + lane / 4), right = b_address(8 * r + lane / 4);
          const Spot a = a_place(lane, r, e), b = b_place(lane, r & 1, e);
          require(left.row == a.row && 8 * left.column + 2 * (lane % 4) + e == a.column, "A" + at(lane, r));
          require(right.row == b.column + 8 * (r >> 1) && 8 * right.column + 2 * (lane % 4) + e == b.row,
                  "B" + at(lane, r));
        }
  });
  check("swizzles_permute_and_avoid_bank_conflicts", [] {
    for (int chunks : {2, 4, 8, 16}) {
      std::set<int> seen;
      for (int row = 0; row < 128; ++row)
        for (int chunk = 0; chunk < chunks; ++chunk) {
          seen.insert(swizzled(row, chunk, chunks));
          require(swizzled(row, chunk, chunks) / chunks == row, "a chunk left its row");
        }
      require(int(seen.size()) == 128 * chunks, "two chunks share a place");
      for (int row = 0; row < 128; row += 8)
        for (int chunk = 0; chunk < chunks; ++chunk) {
          std::set<int> banks;
          for (int i = 0; i < 8; ++i) banks.insert(swizzled(row + i, chunk, chunks) % 8);
          require(banks.size() == 8, std::to_string(chunks) + " chunks: rows of a matrix share a bank");
        }
      for (int step = 8; step < 64; step += 8)  // fetch_rows adds whole multiples of eight rows to one place
        for (int row = 0; row < 8; ++row)
          require(swizzled(row + step, 1, chunks) == swizzled(row, 1, chunks) + step * chunks, "not periodic");
    }
  });
  check("a_warp_multiplies_swizzled_operands", [] {
    for (int chunks : {2, 4, 8, 16})
      for (int step = 0; step < chunks / 2; ++step) product_of_a_warp(chunks, step);
  });
  check("groups_partition_the_codes", [] {
    std::set<int64_t> seen;
    for (int group = 0; group < 32; ++group)
      for (int m = 0; m < kGroup; ++m) {
        const int64_t code = member_code(group, m);
        require(m == 0 || code > member_code(group, m - 1), "members do not ascend");
        // the lane that sees this code of its block in sum m & 1 of product m >> 1
        const Spot place = c_place(group & 3, m & 1);
        require(code == (group >> 2) * 32 + 8 * (m >> 1) + place.column, "not the lane's own codes");
        require(group_of(int(code / 32), int(code % 8) / 2) == group, "group_of disagrees");
        seen.insert(code);
      }
    require(seen.size() == 256 && *seen.rbegin() == 255, "codes are missing");
  });
  check("merging_equals_a_sort_whatever_the_order", [] {
    std::mt19937 random(3);
    for (int trial = 0; trial < 2000; ++trial) {
      const int count = 1 + int(random() % 12), parts = 1 + int(random() % 4);
      std::vector<float> value(count);
      for (float& x : value) x = random() % 5 == 0 ? INFINITY : float(random() % 4);  // many ties
      std::vector<Best> part(parts, none());
      for (int g = 0; g < count; ++g) include(part[g % parts], value[g], g);  // ascending in each part
      std::shuffle(part.begin(), part.end(), random);
      Best all = part[0];
      for (int p = 1; p < parts; ++p) all = merged(all, part[p]);
      const int winner = int(std::min_element(value.begin(), value.end()) - value.begin());
      float second = INFINITY;
      for (int g = 0; g < count; ++g)
        if (g != winner) second = std::min(second, value[g]);
      require(all.best == value[winner] && all.second == second, "wrong values");
      require(all.best == INFINITY || all.group == winner, "not the lowest group");
    }
  });
  check("padding_of_channels", [] {
    for (int d = 1; d <= 1100; ++d) {
      const int padded = padded_channels(d);
      require(padded >= d && padded % 16 == 0, "too few channels");
      require(d <= 128 ? (padded & (padded - 1)) == 0 && (padded == 16 || padded < 2 * d)
                       : padded % 64 == 0 && padded < d + 64,
              "too many channels");
    }
  });
  return 0;
}
