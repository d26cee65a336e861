#include "level.h"

#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

namespace vqkernels {

bool has_level(Level level) {
#if defined(__x86_64__)
  switch (level) {
    case Level::vnni: return __builtin_cpu_supports("avx512vnni") && has_level(Level::avx512);
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_level(Level::avx2);
    case Level::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: return true;
  }
#else
  return level == Level::baseline;
#endif
}

const char* level_name(Level level) {
  return level == Level::vnni ? "vnni" : level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "baseline";
}

Level active_level() {
  static const Level highest = [] {
    Level found = Level::baseline;
    for (Level level : {Level::avx2, Level::avx512, Level::vnni})
      if (has_level(level)) found = level;
    return found;
  }();
  const char* name = getenv("VQKERNELS_SIMD");
  if (name == nullptr || *name == '\0') return highest;
  for (Level level : {Level::baseline, Level::avx2, Level::avx512, Level::vnni}) {
    if (strcmp(name, level_name(level)) != 0) continue;
    if (!has_level(level)) throw std::runtime_error(std::string("VQKERNELS_SIMD=") + name + " but this CPU lacks it");
    return level;
  }
  throw std::runtime_error(std::string("VQKERNELS_SIMD must be baseline, avx2, avx512 or vnni, got '") + name + "'");
}

}  // namespace vqkernels
