// Runs a CUDA block program of csrc/cuda on the CPU, thread by thread, and reports every race in shared memory.
//
// Each thread is a coroutine that runs until it meets the others: at a barrier of the block, or of its warp (shuffles
// and ballots are such a meeting). Which thread goes first within a phase is chosen by a seed. Every two bytes of
// shared memory remember who wrote and read them in the current phase. Two accesses by different threads, one of them a
// write, are ordered if a barrier of the block, or of their common warp, lies between them; where none does, the run
// fails with a sentence, and so it does for a barrier that not every thread reaches, a read of shared memory that
// nobody wrote, an access beyond its end, and a touch of what cp.async has not brought yet. Blocks share nothing here:
// a launch is over before the next begins, and global memory is not watched, so one launch's blocks must not talk to
// one another.
#pragma once
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/portable.h"

namespace executor {

class Machine;

// Who touched a granule of two bytes, and in which phase of the block and of the warp.
struct Access {
  int thread = -1, block_phase = -1, warp_phase = -1;
};

struct Granule {
  Access writer;
  std::vector<Access> readers;  // of the current phase of the block
  bool written = false, in_flight = false;
};

enum class Meeting { none, block, warp };

struct Thread {
  ucontext_t context;  // where the thread begins; from then on it goes back and forth by `jump`, without a system call
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Meeting waits = Meeting::none;
  bool done = false;
  uint64_t exchanged = 0;
  struct Copy {
    int group, at;
    const void* from;
    int bytes;
  };
  std::vector<Copy> copies;
  int group = 0;
};

// One block: its threads, its shared memory, and what went wrong.
class Machine {
 public:
  Machine(int threads, int shared_bytes, uint32_t seed)
      : threads_(threads), memory_(shared_bytes, 0xff), granules_((shared_bytes + 1) / 2), seed_(seed) {}

  ~Machine() {
    for (Thread& thread : threads_)
      if (thread.stack != nullptr) stacks().push_back(std::move(thread.stack));
  }

  void run(const std::function<void(int)>& body) {
    body_ = &body;
    std::mt19937 random(seed_);
    std::vector<int> order(threads_.size());
    for (size_t t = 0; t < order.size(); ++t) order[t] = int(t);
    warp_phase_.assign(order.size() / vqkernels::kWarp + 1, 0);
    for (int t : order) start(t);
    for (bool progress = true; progress && problem_.empty();) {
      if (seed_ == 1) std::reverse(order.begin(), order.end());
      if (seed_ > 1) std::shuffle(order.begin(), order.end(), random);
      progress = false;
      for (int t : order) {
        if (threads_[t].done || threads_[t].waits != Meeting::none || !problem_.empty()) continue;
        current_ = t;
        resume(threads_[t]);
        progress = true;
      }
      progress = release() || progress;
    }
    for (const Thread& thread : threads_)
      if (!thread.done) fail("a barrier is not reached by every thread");
    if (!problem_.empty()) throw std::runtime_error(problem_);
  }

  int current() const { return current_; }
  int count() const { return int(threads_.size()); }

  void meet(Meeting kind) {
    if (!problem_.empty()) leave();
    Thread& thread = threads_[current_];
    thread.waits = kind;
    suspend(thread);
    if (!problem_.empty()) leave();
  }

  uint64_t exchange(uint64_t value, int lane) {
    threads_[current_].exchanged = value;
    meet(Meeting::warp);
    const int source = warp() * vqkernels::kWarp + lane;
    const uint64_t got = threads_[source].exchanged;
    meet(Meeting::warp);
    return got;
  }

  // Every lane's value, for what a whole warp does together.
  void exchange_all(uint64_t value, uint64_t (&got)[vqkernels::kWarp]) {
    threads_[current_].exchanged = value;
    meet(Meeting::warp);
    for (int lane = 0; lane < vqkernels::kWarp; ++lane)
      got[lane] = threads_[warp() * vqkernels::kWarp + lane].exchanged;
  }

  void read(int at, void* to, int bytes) {
    touch(at, bytes, false);
    memcpy(to, memory_.data() + at, bytes);
  }
  void write(int at, const void* from, int bytes) {
    touch(at, bytes, true);
    memcpy(memory_.data() + at, from, bytes);
  }

  void copy_async(int at, const void* from, int bytes) {
    touch(at, bytes, true);
    for (int g = at / 2; g < (at + bytes) / 2; ++g) granules_[g].in_flight = true;
    threads_[current_].copies.push_back({threads_[current_].group, at, from, bytes});
  }
  void commit() { ++threads_[current_].group; }
  void wait(int pending) {
    Thread& thread = threads_[current_];
    const auto landed = [&](const Thread::Copy& copy) { return copy.group < thread.group - pending; };
    for (const auto& copy : thread.copies) {
      if (!landed(copy)) continue;
      for (int g = copy.at / 2; g < (copy.at + copy.bytes) / 2; ++g) granules_[g].in_flight = false;
      write(copy.at, copy.from, copy.bytes);
    }
    thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), landed), thread.copies.end());
  }

 private:
  // Of blocks that are done: a fresh one costs the kernel more than the block's work.
  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> unused;
    return unused;
  }

  int warp() const { return current_ / vqkernels::kWarp; }

  void fail(const std::string& what) {
    if (problem_.empty()) problem_ = what;
  }

  // Ends the running thread for good: the block has failed.
  void leave() {
    threads_[current_].done = true;
    suspend(threads_[current_]);
  }

  static void enter(unsigned high, unsigned low) {
    auto* machine = reinterpret_cast<Machine*>((uintptr_t(high) << 32) | low);
    try {
      (*machine->body_)(machine->current_);
    } catch (const std::exception& error) {
      machine->fail(error.what());
    }
    machine->threads_[machine->current_].done = true;
    machine->suspend(machine->threads_[machine->current_]);
  }

  __attribute__((noinline)) void resume(Thread& thread) {
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.jump, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
  __attribute__((noinline)) void suspend(Thread& thread) {
    if (_setjmp(thread.jump) == 0) _longjmp(scheduler_, 1);
  }

  void start(int t) {
    constexpr size_t kStack = 128 << 10;
    Thread& thread = threads_[t];
    if (stacks().empty()) stacks().emplace_back(new char[kStack]);
    thread.stack = std::move(stacks().back());
    stacks().pop_back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&Machine::enter), 2, unsigned(self >> 32),
                unsigned(self));
  }

  // Lets go every warp, or the block, whose threads have all arrived at the same meeting.
  bool release() {
    bool any = false;
    const auto all = [&](size_t first, size_t last, Meeting kind) {
      return std::all_of(threads_.begin() + first, threads_.begin() + last,
                         [&](const Thread& thread) { return !thread.done && thread.waits == kind; });
    };
    for (size_t first = 0; first < threads_.size(); first += vqkernels::kWarp) {
      const size_t last = std::min(first + vqkernels::kWarp, threads_.size());
      if (!all(first, last, Meeting::warp)) continue;
      for (size_t t = first; t < last; ++t) threads_[t].waits = Meeting::none;
      ++warp_phase_[first / vqkernels::kWarp];
      any = true;
    }
    if (all(0, threads_.size(), Meeting::block)) {
      for (Thread& thread : threads_) thread.waits = Meeting::none;
      ++block_phase_;
      any = true;
    }
    return any;
  }

  bool ordered(const Access& before) const {
    if (before.thread < 0 || before.thread == current_ || before.block_phase < block_phase_) return true;
    return before.thread / vqkernels::kWarp == warp() && before.warp_phase < warp_phase_[warp()];
  }

  void touch(int at, int bytes, bool writes) {
    if (at < 0 || at % 2 || at + bytes > int(memory_.size())) {
      fail("thread " + std::to_string(current_) + " reaches beyond the shared memory, byte " + std::to_string(at));
      leave();
    }
    for (int g = at / 2; g < at / 2 + (bytes + 1) / 2; ++g) {
      Granule& granule = granules_[g];
      const auto race = [&](const char* what, const Access& other) {
        fail("thread " + std::to_string(current_) + " " + (writes ? "writes" : "reads") + " shared byte " +
             std::to_string(2 * g) + " " + what + " thread " + std::to_string(other.thread) + ", no barrier between");
        leave();
      };
      if (granule.in_flight) {
        fail("shared byte " + std::to_string(2 * g) + " is touched before its asynchronous copy was waited for");
        leave();
      }
      if (!ordered(granule.writer)) race("written by", granule.writer);
      const Access now{current_, block_phase_, warp_phase_[warp()]};
      if (!granule.readers.empty() && granule.readers.front().block_phase < block_phase_) granule.readers.clear();
      if (writes) {
        for (const Access& reader : granule.readers)
          if (!ordered(reader)) race("read by", reader);
        granule.writer = now;
        granule.written = true;
      } else if (!granule.written) {
        fail("thread " + std::to_string(current_) + " reads shared byte " + std::to_string(2 * g) + " never written");
        leave();
      } else {
        granule.readers.push_back(now);
      }
    }
  }

  std::vector<Thread> threads_;
  std::vector<unsigned char> memory_;
  std::vector<Granule> granules_;
  std::vector<int> warp_phase_;
  const std::function<void(int)>* body_ = nullptr;
  jmp_buf scheduler_;
  uint32_t seed_;
  int current_ = 0, block_phase_ = 0;
  std::string problem_;
};

template <class T> struct HostShared {
  Machine* machine;
  int at;
  T get(int i) const {
    T x;
    machine->read(at + i * int(sizeof(T)), &x, sizeof(T));
    return x;
  }
  void set(int i, T x) const { machine->write(at + i * int(sizeof(T)), &x, sizeof(T)); }
};

// The block of csrc/cuda/portable.h on the executor.
class HostBlock {
 public:
  template <class T> using Shared = HostShared<T>;
  HostBlock(Machine& machine, int64_t x, int64_t y) : machine_(&machine), x_(x), y_(y) {}

  int thread() const { return machine_->current(); }
  int threads() const { return machine_->count(); }
  int64_t index() const { return x_; }
  int64_t index_y() const { return y_; }
  void sync() const { machine_->meet(Meeting::block); }
  void sync_warp() const { machine_->meet(Meeting::warp); }
  template <class T> T shuffle(T x, int lane) const {
    static_assert(sizeof(T) <= 8, "a shuffle moves one or two words");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(T));
    bits = machine_->exchange(bits, lane & (vqkernels::kWarp - 1));
    memcpy(&x, &bits, sizeof(T));
    return x;
  }
  template <class T> T shuffle_xor(T x, int lanes) const { return shuffle(x, (thread() % vqkernels::kWarp) ^ lanes); }
  uint32_t ballot(bool x) const {
    uint32_t bits = 0;
    for (int lane = 0; lane < vqkernels::kWarp; ++lane) bits |= uint32_t(shuffle(int(x), lane)) << lane;
    return bits;
  }
  // `mine` of every lane of the warp, by address: they stay where they are until the next meeting.
  template <class T> void every_lane(const T& mine, const T* (&all)[vqkernels::kWarp]) const {
    uint64_t got[vqkernels::kWarp];
    machine_->exchange_all(uint64_t(reinterpret_cast<uintptr_t>(&mine)), got);
    for (int lane = 0; lane < vqkernels::kWarp; ++lane) all[lane] = reinterpret_cast<const T*>(uintptr_t(got[lane]));
  }
  template <class T> HostShared<T> shared(int bytes) const { return {machine_, bytes}; }
  template <class T> void copy_async(HostShared<T> to, int i, const T* from) const {
    static_assert(sizeof(T) == 16, "cp.async copies 16 bytes");
    machine_->copy_async(to.at + i * 16, from, 16);
  }
  void commit() const { machine_->commit(); }
  template <int kPending> void wait() const { machine_->wait(kPending); }

 private:
  Machine* machine_;
  int64_t x_, y_;
};

// Runs body(block) for every block of a grid. Seed 0: threads in order; 1: the order reversed in every other phase;
// above: shuffled. Throws std::runtime_error with one sentence at the first thing that is wrong.
template <class Body>
void launch(int64_t grid_x, int64_t grid_y, int threads, int shared_bytes, uint32_t seed, const Body& body) {
  for (int64_t y = 0; y < grid_y; ++y)
    for (int64_t x = 0; x < grid_x; ++x) {
      Machine machine(threads, shared_bytes, seed);
      machine.run([&](int) {
        HostBlock block(machine, x, y);
        body(block);
      });
    }
}

// Launches block programs as StreamLauncher of csrc/cuda/launcher.cuh does, and sorts as CUB does.
struct Launcher {
  uint32_t seed = 0;

  template <class Program> int launch(int64_t grid_x, int64_t grid_y, int shared_bytes, const Program& program) const {
    executor::launch(grid_x, grid_y, Program::kThreads, shared_bytes, seed, program);
    return 0;
  }

  int sort(uint32_t* (&keys)[2], uint32_t* (&order)[2], int64_t total, int bits, void*, int64_t) const {
    const uint32_t looked_at = bits < 32 ? (1u << bits) - 1 : ~0u;
    std::vector<std::pair<uint32_t, uint32_t>> pairs(total);
    for (int64_t i = 0; i < total; ++i) pairs[i] = {keys[0][i], order[0][i]};
    std::stable_sort(pairs.begin(), pairs.end(),
                     [&](const auto& a, const auto& b) { return (a.first & looked_at) < (b.first & looked_at); });
    for (int64_t i = 0; i < total; ++i) keys[1][i] = pairs[i].first, order[1][i] = pairs[i].second;
    std::swap(keys[0], keys[1]);
    std::swap(order[0], order[1]);
    return 0;
  }
};

}  // namespace executor
