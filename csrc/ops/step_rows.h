// From the rows of a table to programs: shared by the ops that run rows.
#pragma once

#include <vector>

#include "ops/solver_step.h"

namespace vivace {

// One program a sample. Checks every size, row, lane and code first; throws an error of `op`. `reduces`: reduction rows
// only (they write nothing), else none of them.
std::vector<StepProgram> decode_rows(const SolverStepArgs& args, const char* op, bool reduces);

// Bytes the programs move, and the same plus what their noise costs in bytes: what `threads_for` is fed.
int64_t bytes_of(const std::vector<StepProgram>& programs, int64_t numel);
int64_t work_of(const std::vector<StepProgram>& programs, int64_t numel);

}  // namespace vivace
