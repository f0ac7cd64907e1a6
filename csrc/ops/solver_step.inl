// The inner loop of the solver step: blocks of four vectors, accumulators of all outputs in registers.
//
// Sums start at -0, so "the first term initialises" needs no branch. A term absent from a row costs one predicted
// branch a block and is never read.
//
// Floor: bytes moved / copy bandwidth. Measured for the UniPC-3 row with guidance (6 reads, 2 writes, 256 MiB, Zen 5):
// 0.93-1.0 of a non-temporal copy (50 GB/s on one core, 105 on two), 1.3 of memcpy. What was tried, one core:
// - a rolled loop over sources: 0.65-0.80. Its branches share addresses, a mispredicted one a block ends the run-ahead
//   that hides memory latency. Unrolled over all twelve, each branch has one address and one outcome.
// - the call that makes noise inside the loop: 0.55-0.65, all accumulators spilled. Hence the buffer filled ahead.
// - software prefetch 1 / 2 / 4 KiB ahead: 0.88 / 0.97 / 0.92 on a quiet machine, where hardware does it already. But
//   beside a process that loads the memory it is 0.97 / 1.0 / 0.88 against 0.57-0.80 without: 2 KiB, from memory only.
// - streaming stores to a destination that is read in the same pass: 0.88; see choose_streams.

namespace vivace::VV_NAMESPACE {

// Normals of every noise source of this block, ahead of the sums: a call among them would spill all accumulators.
static __attribute__((noinline)) void fill_noise(const StepProgram& program, int64_t i, float (*noise)[kBlock]) {
  for (int j = 0; j < program.sources; ++j) {
    if (program.source[j].kind != SourceKind::kNoise) continue;
    const NoiseKey key = {program.seed_low, program.seed_high, program.picture, program.source[j].draw};
    F n[kVectors];
    normal_block(key, program.first + i, n);
    for (int u = 0; u < kVectors; ++u) store(noise[j] + u * kLanes, n[u]);
  }
}

// Asks for the lines of a block that is 2 KiB ahead; past the end of a tensor that does nothing.
template <typename T>
VV_INLINE void prefetch_ahead(const T* p) {
  const char* line = reinterpret_cast<const char*>(p) + 2048;
  for (size_t at = 0; at < kBlock * sizeof(T); at += 64) __builtin_prefetch(line + at);
}

VV_INLINE void load_source(const StepSource& source, int64_t i, const float* noise, bool far, F v[kVectors]) {
  const auto* floats = static_cast<const float*>(source.data) + i;
  const auto* halves = static_cast<const uint16_t*>(source.data) + i;
  if (source.kind == SourceKind::kFloat32) {
    if (far) prefetch_ahead(floats);
    for (int u = 0; u < kVectors; ++u) v[u] = load(floats + u * kLanes);
  } else if (source.kind == SourceKind::kBfloat16) {
    if (far) prefetch_ahead(halves);
    for (int u = 0; u < kVectors; ++u) v[u] = load_bf16(halves + u * kLanes);
  } else if (source.kind == SourceKind::kFloat16) {
    if (far) prefetch_ahead(halves);
    for (int u = 0; u < kVectors; ++u) v[u] = load_f16(halves + u * kLanes);
  } else if (source.kind == SourceKind::kNoise) {
    for (int u = 0; u < kVectors; ++u) v[u] = load(noise + u * kLanes);
  } else {
    for (int u = 0; u < kVectors; ++u) v[u] = set1(1.0f);
  }
  if (source.scale != nullptr) {
    for (int u = 0; u < kVectors; ++u) v[u] = v[u] * load(source.scale + i + u * kLanes);
  }
}

VV_INLINE void store_output(const StepOutput& output, int64_t i, const F y[kVectors]) {
  if (output.dtype == Dtype::kFloat32) {
    float* p = static_cast<float*>(output.data) + i;
    for (int u = 0; u < kVectors; ++u) output.stream ? stream(p + u * kLanes, y[u]) : store(p + u * kLanes, y[u]);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(output.data) + i;
  if (output.dtype == Dtype::kBfloat16) {
    for (int u = 0; u < kVectors; ++u) {
      output.stream ? stream_bf16(p + u * kLanes, y[u]) : store_bf16(p + u * kLanes, y[u]);
    }
  } else {
    for (int u = 0; u < kVectors; ++u) {
      output.stream ? stream_f16(p + u * kLanes, y[u]) : store_f16(p + u * kLanes, y[u]);
    }
  }
}

template <int kOutputs>
VV_INLINE void step_block(const StepProgram& program, int64_t i) {
  alignas(64) float noise[kMaxSources][kBlock];
  if (program.noisy) fill_noise(program, i, noise);
  F y[kOutputs][kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k) {
    for (int u = 0; u < kVectors; ++u) y[k][u] = set1(program.output[k].first);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kMaxSources; ++j) {
    if (j == program.sources) break;
    const StepSource& source = program.source[j];
    F v[kVectors];
    load_source(source, i, noise[j], program.far, v);
#pragma GCC unroll 4
    for (int k = 0; k < kOutputs; ++k) {
      if ((source.used_by >> k & 1) == 0) continue;
      const F coef = set1(source.coef[k]);
      for (int u = 0; u < kVectors; ++u) y[k][u] = y[k][u] + coef * v[u];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k) {
    const StepOutput& output = program.output[k];
#pragma GCC unroll 4
    for (int l = 0; l < k; ++l) {
      if ((output.prev_used >> l & 1) == 0) continue;
      const F coef = set1(output.prev[l]);
      for (int u = 0; u < kVectors; ++u) y[k][u] = y[k][u] + coef * y[l][u];
    }
    if (output.clamp) {
      for (int u = 0; u < kVectors; ++u) {
        y[k][u] = clamp(y[k][u], set1(output.low), set1(output.high)) * set1(output.gain);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k) store_output(program.output[k], i, y[k]);
}

// Fewer elements than a block: the same block on padded copies, so tails have the bits that bodies have.
template <int kOutputs>
static __attribute__((noinline)) void step_partial(const StepProgram& program, int64_t i, int64_t count) {
  alignas(64) float in[kMaxSources][kBlock], scale[kMaxSources][kBlock], out[kOutputs][kBlock];
  StepProgram padded = program;
  padded.first = program.first + i;
  padded.far = false;
  for (int j = 0; j < program.sources; ++j) {
    StepSource& source = padded.source[j];
    if (source.data != nullptr) {
      const int64_t size = source.kind == SourceKind::kFloat32 ? 4 : 2;
      memset(in[j], 0, sizeof in[j]);
      memcpy(in[j], static_cast<const char*>(source.data) + i * size, static_cast<size_t>(count * size));
      source.data = in[j];
    }
    if (source.scale != nullptr) {
      memset(scale[j], 0, sizeof scale[j]);
      memcpy(scale[j], source.scale + i, static_cast<size_t>(count) * 4);
      source.scale = scale[j];
    }
  }
  for (int k = 0; k < kOutputs; ++k) {
    padded.output[k].data = out[k];
    padded.output[k].stream = false;
  }
  step_block<kOutputs>(padded, 0);
  for (int k = 0; k < kOutputs; ++k) {
    const int64_t size = dtype_size(program.output[k].dtype);
    memcpy(static_cast<char*>(program.output[k].data) + i * size, out[k], static_cast<size_t>(count * size));
  }
}

template <int kOutputs>
static void step_loop(const StepProgram& program, int64_t i, int64_t end) {
  while (i < program.head) {  // up to the first aligned element
    const int64_t count = program.head - i < kBlock ? program.head - i : kBlock;
    step_partial<kOutputs>(program, i, count);
    i += count;
  }
  for (; i + kBlock <= end; i += kBlock) step_block<kOutputs>(program, i);
  if (i < end) step_partial<kOutputs>(program, i, end - i);
  stream_fence();
}

// dst[i] <- src[i] where an element is of class `mine`; src has the dtype of dst.
template <typename T>
static void pick_as(T* dst, const T* src, const uint8_t* classes, uint8_t mine, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = classes[i] == mine ? src[i] : dst[i];
}

static void pick_elements(void* dst, const float* src, const uint8_t* classes, uint8_t mine, int64_t count,
                          int64_t size) {
  if (size == 4) return pick_as(static_cast<float*>(dst), src, classes, mine, count);
  pick_as(static_cast<uint16_t*>(dst), reinterpret_cast<const uint16_t*>(src), classes, mine, count);
}

static void step_span(const StepProgram& program, int64_t begin, int64_t end) {
  switch (program.outputs) {
    case 1:
      return step_loop<1>(program, begin, end);
    case 2:
      return step_loop<2>(program, begin, end);
    case 3:
      return step_loop<3>(program, begin, end);
    case 4:
      return step_loop<4>(program, begin, end);
  }
}

}  // namespace vivace::VV_NAMESPACE
