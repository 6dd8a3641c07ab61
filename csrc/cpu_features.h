// Which of the compiled instruction sets to run.
#pragma once

namespace attbalance {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

/// The widest one that this processor has. ATTBALANCE_CPU_ISA = baseline | avx2 | avx512 lowers it, for tests
/// and for comparing; it is read once.
InstructionSet instruction_set();

}  // namespace attbalance
