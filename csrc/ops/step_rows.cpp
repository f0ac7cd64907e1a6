// What a row of the table means for one sample: codes become pointers, or an error that says where.
#include "ops/step_rows.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/philox_normal.h"

namespace vivace {
namespace {

// One row of the table, with the sample it is applied to: turns codes into pointers, or into an error that says where.
class RowDecoder {
 public:
  RowDecoder(const SolverStepArgs& args, const char* op, bool reduces, int64_t sample, int64_t row)
      : args_(args),
        op_(op),
        reduces_(reduces),
        row_(row),
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
    program.kind = check_kind(ints_[kKindColumn], outputs);
    if (ints_[kAdjustedColumn] < 0 || ints_[kAdjustedColumn] >> outputs != 0) where("adjusts outputs it does not have");
    for (int j = 0; j < sources; ++j) add_source(program, j);
    for (int k = 0; k < outputs; ++k) add_output(program, k);
    return program;
  }

 private:
  template <typename... Parts>
  [[noreturn]] void where(const Parts&... parts) const {
    fail(op_, ": row ", row_, " (sample ", sample_, ") ", parts...);
  }

  RowKind check_kind(int32_t kind, int32_t outputs) const {
    if (reduces_ && kind != kThreshold && kind != kRescale) where("is of kind ", kind, "; a reduction row is needed");
    if (!reduces_ && kind != kUpdate) where("is of kind ", kind, "; sample_adjust runs reduction rows");
    if (reduces_ && outputs != kind) where("reduces ", outputs, " outputs; kind ", kind, " reduces ", kind);
    const float ratio = floats_[kLowColumn];
    if (kind == kThreshold && !(ratio >= 0.0f && ratio <= 1.0f)) where("has ratio ", ratio, "; 0 to 1 is needed");
    return static_cast<RowKind>(kind);
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
      if (!reduces_ && ints_[kDestinationColumn + l] == code)
        where("writes destination ", code, " twice (outputs ", l, " and ", k, ")");
      const float prev = floats_[kPrevColumn + k * kMaxOutputs + l];
      output.prev[l] = prev;
      output.prev_used |= (prev != 0.0f) << l;
    }
    if (reduces_) {
      if (code != kNoCode) where("reduces, but writes to ", code, " (output ", k, "); need ", kNoCode);
    } else if (code == kNetCode) {
      if (args_.net == nullptr) where("writes the network input (output ", k, "); pass net");
      output.dtype = args_.net_dtype;
      output.data = static_cast<char*>(args_.net) + lane_ * args_.numel * dtype_size(args_.net_dtype);
    } else if (code >= 0 && code < kOutCode && code < args_.slots) {
      output.dtype = Dtype::kFloat32;
      output.data = slot(code);
    } else {
      where("writes to ", code, " (output ", k, "); need a slot below ", args_.slots, " or ", kNetCode, " for net");
    }
    set_limits(output, k);
    bool empty = output.prev_used == 0;
    for (int j = 0; j < program.sources; ++j) empty = empty && (program.source[j].used_by >> k & 1) == 0;
    output.first = empty ? 0.0f : -0.0f;
  }

  // A reduction row keeps its parameters in `low` and `high` of output 0 and clamps nothing.
  void set_limits(StepOutput& output, int k) const {
    output.low = floats_[kLowColumn + k];
    output.high = floats_[kHighColumn + k];
    output.gain = 1.0f;
    const bool adjusted = ints_[kAdjustedColumn] >> k & 1;
    if (adjusted && args_.adjust == nullptr) where("adjusts output ", k, "; pass adjust");
    if (adjusted) {
      const float* triple = args_.adjust + 3 * sample_;
      output.low = triple[0], output.high = triple[1], output.gain = triple[2];
    }
    output.clamp = !reduces_ && (adjusted || output.low != -INFINITY || output.high != INFINITY);
  }

  float coef(int k, int j) const { return floats_[k * kMaxSources + j]; }

  const SolverStepArgs& args_;
  const char* op_;
  bool reduces_;
  int64_t row_, sample_, lane_;
  const int32_t* ints_;
  const float* floats_;
};

void check_sizes(const SolverStepArgs& args, const char* op) {
  if (args.slots < 0 || args.capacity < 0 || args.numel < 0 || args.batch < 0 || args.table_rows < 0) {
    fail(op, ": negative size (slots ", args.slots, ", capacity ", args.capacity, ", elements ", args.numel, ", batch ",
         args.batch, ", rows ", args.table_rows, ")");
  }
  if (static_cast<double>(args.slots) * args.capacity * args.numel > 0x1p60) {
    fail(op, ": a pool of ", args.slots, " x ", args.capacity, " x ", args.numel, " elements fits no memory");
  }
  if (args.slots > kOutCode) fail(op, ": pool has ", args.slots, " slots; at most ", kOutCode);
  if (args.branches > kMaxBranches) fail(op, ": ", args.branches, " network outputs; at most ", kMaxBranches);
  if (args.tensor_count > kMaxTensors) fail(op, ": ", args.tensor_count, " tensors; at most ", kMaxTensors);
  for (int64_t b = 0; b < args.branches; ++b) {
    const int64_t stride = args.outs[b].stride;
    if (std::fabs(static_cast<double>(stride)) * args.batch > 0x1p60) {
      fail(op, ": network output ", b, " with a stride of ", stride, " elements fits no memory");
    }
  }
}

void check_samples(const SolverStepArgs& args, const char* op) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t row = args.rows[b], lane = args.index[b];
    if (row < 0 || row >= args.table_rows) {
      fail(op, ": sample ", b, " is at row ", row, ", but the table has ", args.table_rows, " rows");
    }
    if (lane < 0 || lane >= args.capacity) {
      fail(op, ": sample ", b, " is in lane ", lane, ", but the pool has ", args.capacity, " lanes");
    }
  }
  std::vector<int64_t> lanes(args.index, args.index + args.batch);
  std::sort(lanes.begin(), lanes.end());
  const auto twice = std::adjacent_find(lanes.begin(), lanes.end());
  if (twice != lanes.end()) fail(op, ": two samples are in lane ", *twice, "; lanes must be distinct");
}

// Tokens of a sample. Throws where patches do not divide the sample.
int64_t check_patches(const SolverStepArgs& args, const char* op) {
  int64_t tokens = 1, elements = 1;
  for (int64_t axis = 0; axis < args.axes; ++axis) {
    const int64_t size = args.sizes[axis], edge = args.edges[axis];
    if (size < 1 || edge < 1 || size % edge != 0) fail(op, ": patches of ", edge, " do not divide an axis of ", size);
    if (elements > args.numel / size) fail(op, ": classes of more elements than a sample has (", args.numel, ")");
    elements *= size;
    tokens *= size / edge;
  }
  if (args.numel % elements != 0) {
    fail(op, ": classes of ", elements, " elements; a sample of ", args.numel, " is no multiple of them");
  }
  return tokens;
}

// From the class of every token to that of every element, axis by axis from the last one.
void expand_patches(const SolverStepArgs& args, std::vector<uint8_t>& map) {
  std::vector<uint8_t> wider;
  size_t inner = 1;  // elements of the axes behind
  for (int64_t axis = args.axes - 1; axis >= 0; --axis) {
    const auto edge = static_cast<size_t>(args.edges[axis]);
    if (edge > 1) {
      wider.resize(map.size() * edge);
      const size_t blocks = map.size() / inner;
      for (size_t block = 0; block < blocks; ++block) {
        const uint8_t* from = map.data() + block * inner;
        uint8_t* to = wider.data() + block * edge * inner;
        if (inner == 1) {
          for (size_t r = 0; r < edge; ++r) to[r] = *from;
        } else {
          for (size_t r = 0; r < edge; ++r) std::copy(from, from + inner, to + r * inner);
        }
      }
      map.swap(wider);
    }
    inner *= static_cast<size_t>(args.sizes[axis]);
  }
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

}  // namespace

std::vector<StepProgram> decode_rows(const SolverStepArgs& args, const char* op, bool reduces) {
  check_sizes(args, op);
  check_samples(args, op);
  std::vector<StepProgram> programs;
  programs.reserve(static_cast<size_t>(args.batch));
  for (int64_t b = 0; b < args.batch; ++b) {
    programs.push_back(RowDecoder(args, op, reduces, b, args.rows[b]).decode());
  }
  return programs;
}

std::vector<ClassedSample> decode_classes(const SolverStepArgs& args, const char* op) {
  check_sizes(args, op);
  check_samples(args, op);
  const int64_t tokens = check_patches(args, op);
  std::vector<ClassedSample> samples(static_cast<size_t>(args.batch));
  for (int64_t b = 0; b < args.batch; ++b) {
    ClassedSample& sample = samples[static_cast<size_t>(b)];
    sample.map.assign(args.classes + b * tokens, args.classes + (b + 1) * tokens);
    bool present[256] = {};
    for (const uint8_t token_class : sample.map) present[token_class] = true;
    for (int c = 0; c < 256; ++c) {
      if (!present[c]) continue;
      const int64_t row = args.rows[b] + c;
      if (row >= args.table_rows) {
        fail(op, ": sample ", b, " has tokens of class ", c, " at row ", row, ", but the table has ", args.table_rows,
             " rows");
      }
      sample.classes.push_back(static_cast<uint8_t>(c));
      sample.programs.push_back(RowDecoder(args, op, false, b, row).decode());
    }
    expand_patches(args, sample.map);
  }
  return samples;
}

StepProgram shifted(const StepProgram& program, int64_t begin) {
  StepProgram piece = program;
  piece.first = program.first + begin;
  for (int j = 0; j < program.sources; ++j) {
    StepSource& source = piece.source[j];
    const int64_t size = source.kind == SourceKind::kFloat32 ? 4 : 2;
    if (source.data != nullptr) source.data = static_cast<const char*>(source.data) + begin * size;
    if (source.scale != nullptr) source.scale += begin;
  }
  return piece;
}

int64_t bytes_of(const std::vector<StepProgram>& programs, int64_t numel) {
  int64_t bytes = 0;
  for (const StepProgram& program : programs) bytes += bytes_per_element(program) * numel;
  return bytes;
}

int64_t work_of(const std::vector<StepProgram>& programs, int64_t numel) {
  int64_t normals = 0;
  for (const StepProgram& program : programs) normals += normals_per_element(program) * numel;
  return bytes_of(programs, numel) + normals * kBytesPerNormal;
}

}  // namespace vivace
