// The whole search and its look-up on the executor, for Python: the steps that nearest.cu launches, block by block.
#include <stdio.h>

#include "../../csrc/cuda/finish.h"
#include "../../csrc/cuda/steps.h"
#include "cuda_matrix.h"

using namespace vqkernels;
using namespace vqkernels::cuda;

namespace {

struct HostLauncher {
  uint32_t seed;
  int processors, launches = 0;

  template <class Body> void one(int64_t x, int64_t y, int threads, int bytes, const Body& body) {
    executor::launch(x, y, threads, bytes, seed, body);
    ++launches;
  }
  template <class T> void zero(T* at) { *at = 0; }
  void pack(const Call& call, int64_t x, int64_t y) {
    const int bytes = pack_shared_bytes(call.plan.padded);
    one(x, y, kPackThreads, bytes, [&](executor::HostBlock& block) { pack_block(block, call); });
  }
  void search(const SearchArguments& a, int64_t x, int64_t y) {
    switch (a.padded) {
      case 16: return search_as<16, false>(a, x, y);
      case 32: return search_as<32, false>(a, x, y);
      case 64: return search_as<64, false>(a, x, y);
      case 128: return search_as<128, false>(a, x, y);
      default: return search_as<kStreamSlice, true>(a, x, y);
    }
  }
  void finish(const Call& call, int64_t x, int64_t y) {
    one(x, y, kFinishThreads, kFinishBytes, [&](executor::HostBlock& block) { finish_block(block, call); });
  }
  void resolve(const Call& call, int64_t x, int64_t y) {
    one(x, y, kFinishThreads, 0, [&](executor::HostBlock& block) { resolve_block(block, call, x); });
  }
  void rescore(const Call& call, int64_t x, int64_t y) {
    one(x, y, kFinishThreads, kRescoreBytes, [&](executor::HostBlock& block) { rescore_block(block, call, x); });
  }
  void gather(const Call& call, int64_t x, int64_t y) {
    one(x, y, kFinishThreads, kGatherBytes, [&](executor::HostBlock& block) { gather_block(block, call); });
  }

 private:
  template <int kSlice, bool kStreamed> void search_as(const SearchArguments& a, int64_t x, int64_t y) {
    one(x, y, kSearchThreads, search_shared_bytes(kSlice, kStreamed),
        [&](executor::HostBlock& block) { search_block<kSlice, kStreamed>(block, a); });
  }
};

}  // namespace

extern "C" {

int64_t cuda_nearest_workspace(const Problem* problem, int processors) {
  if (!countable(*problem)) return -1;
  Operands operands;
  return int64_t(lay_out(*problem, plan_of(*problem, processors), nullptr, operands));
}

// `separate`: the launches of many rows, however few there are. Returns how many, or -1 with a sentence in `complaint`.
int cuda_nearest(const Problem* problem, const Output* out, int64_t* decided, int processors, int separate,
                 uint32_t seed, char* workspace, int* splits, char* complaint, int complaint_bytes) {
  Call call = {*problem, plan_of(*problem, processors), {}, *out};
  lay_out(*problem, call.plan, workspace, call.operands);
  call.operands.decided = decided;
  call.plan.fused = !separate;
  *splits = call.plan.splits;
  HostLauncher launch{seed, processors};
  try {
    run_steps(launch, call, processors);
  } catch (const std::exception& error) {
    snprintf(complaint, size_t(complaint_bytes), "%s", error.what());
    return -1;
  }
  return launch.launches;
}

int cuda_plan(const Problem* problem, int processors, Plan* plan) {
  if (!countable(*problem)) return -1;
  *plan = plan_of(*problem, processors);
  return 0;
}

// Packs alone; `operands` points into the workspace then. Head 0's centre and frame: {c, whether it is provable}.
int cuda_pack(const Problem* problem, int processors, char* workspace, Operands* operands, Plan* plan, float* centre,
              int* frame, char* complaint, int complaint_bytes) {
  Call call = {*problem, plan_of(*problem, processors), {}, {}};
  lay_out(*problem, call.plan, workspace, call.operands);
  HostLauncher launch{0, processors};
  try {
    launch.pack(call, call.plan.code_parts + call.plan.row_parts, problem->z.heads);
    launch.one(1, 1, kPackThreads, pack_shared_bytes(call.plan.padded), [&](executor::HostBlock& block) {
      const Frame found = frame_of(block, call, 0);
      if (block.thread() != 0) return;
      for (int d = 0; d < call.plan.padded; ++d) centre[d] = block.shared<float>(0).get(d);
      frame[0] = found.exponent, frame[1] = found.provable;
    });
  } catch (const std::exception& error) {
    snprintf(complaint, size_t(complaint_bytes), "%s", error.what());
    return -1;
  }
  *operands = call.operands;
  *plan = call.plan;
  return 0;
}

// The limit of rows whose best scores are given.
void cuda_limits(const Problem* problem, float radius, float spread, int left_out, int count, const float* best,
                 const float* norm, const float* error, float* out) {
  const Call call = {*problem, plan_of(*problem, 1), {}, {}};
  for (int i = 0; i < count; ++i)
    out[i] = limit_of(call, Extent{radius, spread, left_out != 0}, best[i], norm[i], error[i]);
}

// What benchmarks/budgets/cuda_search.py says of shared memory.
int cuda_search_shared_bytes(int slice, int streamed) { return search_shared_bytes(slice, streamed != 0); }

int64_t cuda_lookup_workspace(const Problem* problem) { return lookup_bytes(*problem); }

// Indices that were given; the workspace is zero. Returns 0, or -1 with a sentence in `complaint`.
int cuda_lookup(const Problem* problem, const Output* out, uint32_t seed, char* workspace, char* complaint,
                int complaint_bytes) {
  const Call call = lookup_call(*problem, *out, workspace);
  HostLauncher launch{seed, 1};
  try {
    *out->squared_error = 0.0;
    if (call.plan.rows > 0) launch.gather(call, call.plan.row_groups, problem->z.heads);
  } catch (const std::exception& error) {
    snprintf(complaint, size_t(complaint_bytes), "%s", error.what());
    return -1;
  }
  return 0;
}
}
