// CPU features and the choice of an instruction set.
#pragma once

#include <string>
#include <vector>

#include "simd/kernels.h"

namespace vivace {

// Instruction sets this build has and this machine can run, narrowest first; "scalar" is always there.
std::vector<std::string> available_isas();

// The widest available table, or the one VIVACE_CPU_ISA names; throws when that one is unknown or cannot run here.
const Kernels& kernels();

}  // namespace vivace
