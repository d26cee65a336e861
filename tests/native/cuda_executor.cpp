// The executor itself: it runs what is ordered, and it reports each way of not being ordered.
#include "cuda_executor.h"

#include "checks.h"

using executor::HostBlock;
using executor::launch;

namespace {

struct Quad {
  uint32_t word[4];
};

void expect(const char* part, const std::string& found) {
  require(found.find(part) != std::string::npos, "expected '" + std::string(part) + "', got '" + found + "'");
}

// Each thread reads what its neighbour wrote; `barrier` says how they are kept apart.
template <class Barrier> std::string neighbours(int distance, uint32_t seed, const Barrier& barrier) {
  return complaint([&] {
    launch(2, 1, 64, 64 * 4, seed, [&](HostBlock& block) {
      auto memory = block.shared<int>(0);
      memory.set(block.thread(), block.thread() * 3);
      barrier(block);
      const int other = block.thread() ^ distance;
      require(memory.get(other) == other * 3, "a wrong value");
    });
  });
}

}  // namespace

int main() {
  check("a_barrier_orders_a_block", [] {
    for (uint32_t seed = 0; seed < 4; ++seed)
      require(neighbours(32, seed, [](HostBlock& block) { block.sync(); }).empty(), "a race where there is none");
  });
  check("a_missing_barrier_is_reported", [] {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      const std::string found = neighbours(1, seed, [](HostBlock&) {});
      require(!found.empty(), "no race was reported");
    }
    // Even where the order of execution happens to give the right value.
    expect("no barrier between", complaint([] {
             launch(1, 1, 32, 64, 0, [](HostBlock& block) {
               auto memory = block.shared<int>(0);
               if (block.thread() == 0) memory.set(0, 7);
               if (block.thread() == 1) require(memory.get(0) == 7, "a wrong value");
             });
           }));
  });
  check("a_warp_barrier_orders_its_warp_alone", [] {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      require(neighbours(1, seed, [](HostBlock& block) { block.sync_warp(); }).empty(), "a race within a warp");
      require(!neighbours(32, seed, [](HostBlock& block) { block.sync_warp(); }).empty(), "no race between warps");
    }
  });
  check("a_write_after_another_thread_read_is_reported", [] {
    expect("read by", complaint([] {
             launch(1, 1, 32, 64, 0, [](HostBlock& block) {
               auto memory = block.shared<int>(0);
               if (block.thread() == 0) memory.set(0, 7);
               block.sync();
               memory.get(0);
               if (block.thread() == 31) memory.set(0, 8);
             });
           }));
  });
  check("shuffles_and_ballots_move_the_values_of_lanes", [] {
    launch(1, 2, 64, 0, 2, [](HostBlock& block) {
      const int lane = block.thread() % 32, warp = block.thread() / 32;
      require(block.shuffle(block.thread(), 5) == warp * 32 + 5, "shuffle");
      require(block.shuffle_xor(1.5f * float(block.thread()), 4) == 1.5f * float(block.thread() ^ 4), "shuffle_xor");
      require(block.ballot(lane % 2 == 1) == 0xaaaaaaaau, "ballot");
    });
  });
  check("a_barrier_that_not_every_thread_reaches_is_reported", [] {
    expect("not reached by every thread", complaint([] {
             launch(1, 1, 64, 0, 0, [](HostBlock& block) {
               if (block.thread() != 40) block.sync();
             });
           }));
    expect("not reached by every thread", complaint([] {
             launch(1, 1, 32, 0, 0, [](HostBlock& block) {
               if (block.thread() < 16) block.sync_warp();
               else block.sync();
             });
           }));
  });
  check("unwritten_and_outside_memory_are_reported", [] {
    expect("never written", complaint([] { launch(1, 1, 32, 8, 0, [](HostBlock& b) { b.shared<int>(4).get(0); }); }));
    expect("beyond", complaint([] { launch(1, 1, 32, 8, 0, [](HostBlock& b) { b.shared<int>(4).set(1, 0); }); }));
  });
  check("an_asynchronous_copy_lands_when_it_is_waited_for", [] {
    const auto run = [](bool wait, bool barrier) {
      return complaint([&] {
        static Quad source[64];
        for (uint32_t i = 0; i < 64; ++i) source[i] = {{i, i + 1, i + 2, i + 3}};
        launch(1, 1, 32, 64 * 16, 0, [&](HostBlock& block) {
          auto memory = block.shared<Quad>(0);
          for (int group = 0; group < 2; ++group) {
            block.copy_async(memory, group * 32 + block.thread(), source + group * 32 + block.thread());
            block.commit();
          }
          if (wait) block.wait<1>();
          if (barrier) block.sync();
          require(memory.get(block.thread() ^ 1).word[2] == uint32_t(block.thread() ^ 1) + 2, "a wrong value");
        });
      });
    };
    require(run(true, true).empty(), "a race where there is none: " + run(true, true));
    expect("before its asynchronous copy was waited for", run(false, true));
    require(!run(true, false).empty(), "no race was reported");
  });
  return 0;
}
