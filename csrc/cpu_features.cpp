#include "cpu_features.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace attbalance {
namespace {

InstructionSet widest_available() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return avx512 ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
    }
#endif
    return InstructionSet::kBaseline;
}

InstructionSet widest_allowed() {
    // NOLINTNEXTLINE(concurrency-mt-unsafe): read once, at the first call
    const char* name = std::getenv("ATTBALANCE_CPU_ISA");
    if (name && std::strcmp(name, "baseline") == 0) return InstructionSet::kBaseline;
    if (name && std::strcmp(name, "avx2") == 0) return InstructionSet::kAvx2;
    if (name && std::strcmp(name, "avx512") != 0) {
        std::fprintf(
            stderr,
            "attbalance_ext: ATTBALANCE_CPU_ISA must be baseline, avx2 or avx512, got '%s': ignored\n", name);
    }
    return InstructionSet::kAvx512;
}

}  // namespace

InstructionSet instruction_set() {
    static const InstructionSet chosen = std::min(widest_available(), widest_allowed());
    return chosen;
}

bool needs_prefetch() {
#if defined(__x86_64__)
    static const bool needed = __builtin_cpu_is("amd");
    return needed;
#else
    return false;
#endif
}

}  // namespace attbalance
