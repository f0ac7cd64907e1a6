// From the rows of a table to programs: shared by the ops that run rows.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/solver_step.h"

namespace vivace {

// One program a sample. Checks every size, row, lane and code first; throws an error of `op`. `reduces`: reduction rows
// only (they write nothing), else none of them.
std::vector<StepProgram> decode_rows(const SolverStepArgs& args, const char* op, bool reduces);

// A sample whose elements are at several rows: of which class each is, and the program of every class it has.
struct ClassedSample {
  std::vector<uint8_t> map;  // class by element of one channel
  std::vector<uint8_t> classes;
  std::vector<StepProgram> programs;  // one a class
};

// The samples of a call with classes, checked as above; elements of a class run row rows[b] + class.
std::vector<ClassedSample> decode_classes(const SolverStepArgs& args, const char* op);

// The same program on the elements from `begin` on; outputs stay where they are.
StepProgram shifted(const StepProgram& program, int64_t begin);

// Bytes the programs move, and the same plus what their noise costs in bytes: what `threads_for` is fed.
int64_t bytes_of(const std::vector<StepProgram>& programs, int64_t numel);
int64_t work_of(const std::vector<StepProgram>& programs, int64_t numel);

}  // namespace vivace
