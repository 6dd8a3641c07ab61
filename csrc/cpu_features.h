// What this processor can do, and needs.
#pragma once

namespace attbalance {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

/// The widest one that this processor has. ATTBALANCE_CPU_ISA = baseline | avx2 | avx512 lowers it, for tests
/// and for comparing; it is read once.
InstructionSet instruction_set();

/// Whether a stream of reads gets faster by software prefetches. AMD's prefetchers stop at the end of each
/// page (Zen 4: reads twice as fast with them); Intel's do not, and what is prefetched too takes their place
/// (Sapphire Rapids: a tenth slower).
bool needs_prefetch();

}  // namespace attbalance
