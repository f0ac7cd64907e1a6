// Cuts the batch into spans for the threads; the rows' meaning is in step_rows.cpp.
#include "ops/solver_step.h"

#include <algorithm>
#include <vector>

#include "core/float_mode.h"
#include "core/machine.h"
#include "core/thread_pool.h"
#include "ops/philox_normal.h"
#include "ops/step_rows.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kAlignment = 64;            // of streamed float32 stores; half types need (and get) half of it
constexpr int64_t kChunk = int64_t{1} << 15;  // elements a task covers: about 1 MiB of traffic, some 50 us
constexpr int64_t kPiece = 1024;              // elements whose classes are told apart together: they stay in the cache

bool reads(const StepProgram& program, const void* data) {
  for (int j = 0; j < program.sources; ++j) {
    if (program.source[j].data == data || program.source[j].scale == data) return true;
  }
  return false;
}

// Lets stores go around the cache where that saves the read of the line: not for a destination that is read in the
// same pass (its line is there already), and only where peeling one common head aligns it.
void choose_streams(StepProgram& program, int64_t numel) {
  int64_t head = -1;
  for (int k = 0; k < program.outputs; ++k) {
    StepOutput& output = program.output[k];
    if (reads(program, output.data)) continue;
    const int64_t size = dtype_size(output.dtype), alignment = kAlignment * size / 4;
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output.data) % kAlignment);
    if (head < 0) head = (alignment - address % alignment) % alignment / size;
    // Counters of noise come in fours, so a head that is no multiple of four would cut one.
    output.stream = (address + head * size) % alignment == 0 && head <= numel && (!program.noisy || head % 4 == 0);
    if (output.stream) program.head = head;
  }
}

// Elements [begin, begin + count) of a sample with classes: every class that occurs is computed for all of them, and
// each element takes what its own class gives it. An element is read by its own class before it is written.
void step_piece(const ClassedSample& sample, int64_t begin, int64_t count) {
  const Kernels& table = kernels();
  uint8_t classes[kPiece];
  const auto channel = static_cast<int64_t>(sample.map.size());
  for (int64_t done = 0; done < count;) {
    const int64_t at = (begin + done) % channel, length = std::min(count - done, channel - at);
    std::copy_n(sample.map.data() + at, length, classes + done);
    done += length;
  }
  alignas(64) float y[kMaxOutputs][kPiece];
  for (size_t p = 0; p < sample.programs.size(); ++p) {
    const uint8_t mine = sample.classes[p];
    const auto here = std::count(classes, classes + count, mine);
    if (here == 0) continue;
    const StepProgram& program = sample.programs[p];
    if (here == count) return table.step_span(program, begin, begin + count);
    StepProgram piece = shifted(program, begin);
    for (int k = 0; k < piece.outputs; ++k) piece.output[k].data = y[k];
    table.step_span(piece, 0, count);
    for (int k = 0; k < piece.outputs; ++k) {
      const int64_t size = dtype_size(program.output[k].dtype);
      void* to = static_cast<char*>(program.output[k].data) + begin * size;
      table.pick_elements(to, y[k], classes, mine, count, size);
    }
  }
}

void step_classes(const SolverStepArgs& args) {
  std::vector<ClassedSample> samples = decode_classes(args, "solver_step");
  int64_t bytes = 0, work = 0;
  for (const ClassedSample& sample : samples) {
    bytes += bytes_of(sample.programs, args.numel);
    work += work_of(sample.programs, args.numel);
  }
  if (bytes == 0) return;
  const int64_t stream_above = args.stream_above < 0 ? last_level_cache_bytes() : args.stream_above;
  for (ClassedSample& sample : samples) {
    for (StepProgram& program : sample.programs) program.far = bytes > stream_above;
  }
  const int64_t chunks = (args.numel + kChunk - 1) / kChunk;
  parallel_for(threads_for(work, args.threads), args.batch * chunks, [&](int64_t task) {
    const FloatMode mode;
    const int64_t first = task % chunks * kChunk, end = std::min(args.numel, first + kChunk);
    for (int64_t begin = first; begin < end; begin += kPiece) {
      step_piece(samples[static_cast<size_t>(task / chunks)], begin, std::min(kPiece, end - begin));
    }
  });
}

}  // namespace

void solver_step(const SolverStepArgs& args) {
  if (args.classes != nullptr) return step_classes(args);
  const Kernels& table = kernels();
  std::vector<StepProgram> programs = decode_rows(args, "solver_step", false);
  const int64_t bytes = bytes_of(programs, args.numel), work = work_of(programs, args.numel);
  if (bytes == 0) return;
  const int64_t stream_above = args.stream_above < 0 ? last_level_cache_bytes() : args.stream_above;
  if (bytes > stream_above) {
    for (StepProgram& program : programs) {
      program.far = true;
      choose_streams(program, args.numel);
    }
  }
  const int64_t chunks = (args.numel + kChunk - 1) / kChunk;
  const int threads = threads_for(work, args.threads);
  parallel_for(threads, args.batch * chunks, [&](int64_t task) {
    const FloatMode mode;
    const StepProgram& program = programs[static_cast<size_t>(task / chunks)];
    // Every cut lies `head` after a multiple of the chunk, so that whole vectors are aligned in every span.
    const int64_t chunk = task % chunks;
    const int64_t begin = chunk == 0 ? 0 : std::min(args.numel, chunk * kChunk + program.head);
    const int64_t end = std::min(args.numel, (chunk + 1) * kChunk + program.head);
    if (begin < end) table.step_span(program, begin, end);
  });
}

}  // namespace vivace
