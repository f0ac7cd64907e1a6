// Checks the arguments, decodes each sample's row into a StepProgram and cuts the batch into spans for the threads.
#include "ops/solver_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/machine.h"
#include "core/thread_pool.h"
#include "ops/philox_normal.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kAlignment = 64;            // of streamed float32 stores; half types need (and get) half of it
constexpr int64_t kChunk = int64_t{1} << 15;  // elements a task covers: about 1 MiB of traffic, some 50 us

// One row of the table, with the sample it is applied to: turns codes into pointers, or into an error that says where.
class RowDecoder {
 public:
  RowDecoder(const SolverStepArgs& args, int64_t sample)
      : args_(args),
        row_(args.rows[sample]),
        sample_(sample),
        lane_(args.index[sample]),
        ints_(args.ints + row_ * kIntColumns),
        floats_(args.floats + row_ * kFloatColumns) {}

  StepProgram decode() {
    StepProgram program{};
    const int32_t sources = ints_[0], outputs = ints_[1];
    if (sources < 0 || sources > kMaxSources) where("has ", sources, " sources; 0 to ", kMaxSources, " fit");
    if (outputs < 0 || outputs > kMaxOutputs) where("has ", outputs, " outputs; 0 to ", kMaxOutputs, " fit");
    program.outputs = outputs;
    for (int j = 0; j < sources; ++j) add_source(program, j);
    for (int k = 0; k < outputs; ++k) add_output(program, k);
    return program;
  }

 private:
  template <typename... Parts>
  [[noreturn]] void where(const Parts&... parts) const {
    fail("solver_step: row ", row_, " (sample ", sample_, ") ", parts...);
  }

  float* slot(int32_t code) const { return args_.pool + (code * args_.capacity + lane_) * args_.numel; }

  void add_source(StepProgram& program, int j) const {
    uint32_t used_by = 0;
    for (int k = 0; k < program.outputs; ++k) used_by |= (coef(k, j) != 0.0f) << k;
    if (used_by == 0) return;
    StepSource& source = program.source[program.sources++];
    source.used_by = used_by;
    for (int k = 0; k < program.outputs; ++k) source.coef[k] = coef(k, j);
    resolve(program, source, ints_[kSourceColumn + j], j);
    const int32_t scale = ints_[kScaleColumn + j];
    if (scale != -1) source.scale = tensor_or_slot(scale, "scale", j);
  }

  void resolve(StepProgram& program, StepSource& source, int32_t code, int j) const {
    if (code >= kOutCode && code < kOutCode + kMaxBranches) {
      const int branch = code - kOutCode;
      if (branch >= args_.branches) {
        where("reads branch ", branch, " (source ", j, "), but there are ", args_.branches, " network outputs");
      }
      const Branch& out = args_.outs[branch];
      source.kind = static_cast<SourceKind>(out.dtype);
      source.data = static_cast<const char*>(out.data) + sample_ * out.stride * dtype_size(out.dtype);
    } else if (code == kOneCode) {
      source.kind = SourceKind::kOne;
    } else if (code >= kNoiseCode) {
      if (args_.seeds == nullptr || args_.pictures == nullptr) {
        where("reads noise draw ", code - kNoiseCode, " (source ", j, "); pass seeds and pictures");
      }
      if (args_.numel > kMaxNoiseElements)
        where("reads noise; a sample may have ", kMaxNoiseElements, " elements then");
      source.kind = SourceKind::kNoise;
      program.noisy = true;
      source.draw = static_cast<uint32_t>(code - kNoiseCode);
      const auto seed = static_cast<uint64_t>(args_.seeds[sample_]);
      program.seed_low = static_cast<uint32_t>(seed);
      program.seed_high = static_cast<uint32_t>(seed >> 32);
      program.picture = static_cast<uint32_t>(args_.pictures[sample_]);
    } else {
      source.kind = SourceKind::kFloat32;
      source.data = tensor_or_slot(code, "source", j);
    }
  }

  const float* tensor_or_slot(int32_t code, const char* role, int j) const {
    if (code >= 0 && code < kOutCode && code < args_.slots) return slot(code);
    if (code >= 0 && code < kOutCode) {
      where("names pool slot ", code, " (", role, " ", j, "), but the pool has ", args_.slots, " slots");
    }
    if (code < kTensorCode || code >= kTensorCode + kMaxTensors)
      where("has the unknown code ", code, " (", role, " ", j, ")");
    if (code - kTensorCode >= args_.tensor_count) {
      where("names tensor ", code - kTensorCode, " (", role, " ", j, "), but ", args_.tensor_count, " were given");
    }
    return args_.tensors[code - kTensorCode];
  }

  void add_output(StepProgram& program, int k) const {
    StepOutput& output = program.output[k];
    const int32_t code = ints_[kDestinationColumn + k];
    for (int l = 0; l < k; ++l) {
      if (ints_[kDestinationColumn + l] == code)
        where("writes destination ", code, " twice (outputs ", l, " and ", k, ")");
      const float prev = floats_[kPrevColumn + k * kMaxOutputs + l];
      output.prev[l] = prev;
      output.prev_used |= (prev != 0.0f) << l;
    }
    if (code == kNetCode) {
      if (args_.net == nullptr) where("writes the network input (output ", k, "); pass net");
      output.dtype = args_.net_dtype;
      output.data = static_cast<char*>(args_.net) + lane_ * args_.numel * dtype_size(args_.net_dtype);
    } else if (code >= 0 && code < kOutCode && code < args_.slots) {
      output.dtype = Dtype::kFloat32;
      output.data = slot(code);
    } else {
      where("writes to ", code, " (output ", k, "); need a slot below ", args_.slots, " or ", kNetCode, " for net");
    }
    output.low = floats_[kLowColumn + k];
    output.high = floats_[kHighColumn + k];
    output.clamp = output.low != -INFINITY || output.high != INFINITY;
    bool empty = output.prev_used == 0;
    for (int j = 0; j < program.sources; ++j) empty = empty && (program.source[j].used_by >> k & 1) == 0;
    output.first = empty ? 0.0f : -0.0f;
  }

  float coef(int k, int j) const { return floats_[k * kMaxSources + j]; }

  const SolverStepArgs& args_;
  int64_t row_, sample_, lane_;
  const int32_t* ints_;
  const float* floats_;
};

void check_sizes(const SolverStepArgs& args) {
  if (args.slots < 0 || args.capacity < 0 || args.numel < 0 || args.batch < 0 || args.table_rows < 0) {
    fail("solver_step: negative size (slots ", args.slots, ", capacity ", args.capacity, ", elements ", args.numel,
         ", batch ", args.batch, ", rows ", args.table_rows, ")");
  }
  if (static_cast<double>(args.slots) * args.capacity * args.numel > 0x1p60) {
    fail("solver_step: a pool of ", args.slots, " x ", args.capacity, " x ", args.numel, " elements fits no memory");
  }
  if (args.slots > kOutCode) fail("solver_step: pool has ", args.slots, " slots; at most ", kOutCode);
  if (args.branches > kMaxBranches) fail("solver_step: ", args.branches, " network outputs; at most ", kMaxBranches);
  if (args.tensor_count > kMaxTensors) fail("solver_step: ", args.tensor_count, " tensors; at most ", kMaxTensors);
}

void check_samples(const SolverStepArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t row = args.rows[b], lane = args.index[b];
    if (row < 0 || row >= args.table_rows) {
      fail("solver_step: sample ", b, " is at row ", row, ", but the table has ", args.table_rows, " rows");
    }
    if (lane < 0 || lane >= args.capacity) {
      fail("solver_step: sample ", b, " is in lane ", lane, ", but the pool has ", args.capacity, " lanes");
    }
  }
  std::vector<int64_t> lanes(args.index, args.index + args.batch);
  std::sort(lanes.begin(), lanes.end());
  const auto twice = std::adjacent_find(lanes.begin(), lanes.end());
  if (twice != lanes.end()) fail("solver_step: two samples are in lane ", *twice, "; lanes must be distinct");
}

int64_t bytes_per_element(const StepProgram& program) {
  int64_t bytes = 0;
  for (int j = 0; j < program.sources; ++j) {
    const StepSource& source = program.source[j];
    if (source.data != nullptr) bytes += source.kind == SourceKind::kFloat32 ? 4 : 2;
    if (source.scale != nullptr) bytes += 4;
  }
  for (int k = 0; k < program.outputs; ++k) bytes += dtype_size(program.output[k].dtype);
  return bytes;
}

int64_t normals_per_element(const StepProgram& program) {
  return std::count_if(program.source, program.source + program.sources,
                       [](const StepSource& source) { return source.kind == SourceKind::kNoise; });
}

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

}  // namespace

void solver_step(const SolverStepArgs& args) {
  check_sizes(args);
  check_samples(args);
  const Kernels& table = kernels();
  std::vector<StepProgram> programs;
  programs.reserve(static_cast<size_t>(args.batch));
  int64_t bytes = 0, normals = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    programs.push_back(RowDecoder(args, b).decode());
    bytes += bytes_per_element(programs.back()) * args.numel;
    normals += normals_per_element(programs.back()) * args.numel;
  }
  if (bytes == 0) return;
  const int64_t stream_above = args.stream_above < 0 ? last_level_cache_bytes() : args.stream_above;
  if (bytes > stream_above) {
    for (StepProgram& program : programs) choose_streams(program, args.numel);
  }
  const int64_t chunks = (args.numel + kChunk - 1) / kChunk;
  const int threads = threads_for(bytes + normals * kBytesPerNormal, args.threads);
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
