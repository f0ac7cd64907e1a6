// A block of rows by a panel: products into a tile of float32, then bias, activation, gate and residual on the way out.
//
// Floor: multiply-adds, 64 (float32) or 128 (bfloat16) operations a cycle of AVX-512. Tried on one Zen 5 core, mean
// GFLOP/s of 14 linears of DiT, float32 / bfloat16, of 235 / 470 there are, weights from memory:
// - as it is 216 / 437; not asking for the next block of depth while this one is multiplied 207 / 420, with 64 rows 213
//   and 188; asking for the panel or the rows a few steps ahead: nothing;
// - blocks of rows of 24, 48, 96 and of depth of 96 to 1024: alike within 2 %.

namespace vivace::VV_NAMESPACE {

constexpr float kMinusLog2E = -0x1.715476p+0f;

template <int N, typename T>
VV_INLINE void silu_vectors(const F x[N], F y[N]) {
  F t[N];
  for (int u = 0; u < N; ++u) t[u] = x[u] * set1(kMinusLog2E);
  exp2<N, T>(t, y);
  for (int u = 0; u < N; ++u) y[u] = x[u] / (y[u] + set1(1.0f));
}

// As exact as a result of type T can show.
template <Activation kActivation, int N, typename T>
VV_INLINE void activate(const F x[N], F y[N]) {
  for (int u = 0; u < N; ++u) y[u] = x[u];
  if (kActivation == Activation::kGelu) gelu_by_erf<N, T>(x, y);
  if (kActivation == Activation::kGeluTanh) gelu_by_tanh<N, T>(x, y);
  if (kActivation == Activation::kSilu) silu_vectors<N, T>(x, y);
}

// A block of a row.
template <typename T>
VV_INLINE void store_block_of(T* out, const F y[kVectors]) {
  for (int u = 0; u < kVectors; ++u) store_row(out + u * kLanes, y[u]);
}

#if VV_ISA == VV_AVX512_BF16
// The instruction flushes subnormal numbers: it is for blocks without one.
VV_INLINE void store_block_of(uint16_t* out, const F y[kVectors]) {
  constexpr int kSubnormal = 0x20;
  __mmask16 any = 0;
  for (int u = 0; u < kVectors; ++u) any |= _mm512_fpclass_ps_mask(y[u].x, kSubnormal);
  if (__builtin_expect(any != 0, 0)) return store_block_of<uint16_t>(out, y);
  for (int u = 0; u < kVectors; u += 2) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(y[u + 1].x, y[u].x);
    _mm512_storeu_si512(out + u * kLanes, reinterpret_cast<__m512i>(pair));
  }
}
#endif

// What happens to a row on its way out: 64 columns. sum(i): the vector at column i, bias added.
template <Activation kActivation, typename T, typename Sum>
VV_INLINE void finish_panel(const Sum& sum, const float* gate, const T* residual, T* out) {
  for (int i = 0; i < kPanel; i += kBlock) {
    F x[kVectors], y[kVectors];
    for (int u = 0; u < kVectors; ++u) x[u] = sum(i + u * kLanes);
    activate<kActivation, kVectors, T>(x, y);
    if (gate != nullptr) {
      for (int u = 0; u < kVectors; ++u) y[u] = y[u] * load(gate + i + u * kLanes);
    }
    if (residual != nullptr) {
      for (int u = 0; u < kVectors; ++u) y[u] = load_row(residual + i + u * kLanes) + y[u];
    }
    store_block_of(out + i, y);
  }
}

// Rows [row, row + rows) of a call, numbered through its samples, and columns [column, column + columns) of its result.
struct Tile {
  int64_t row, rows, column, columns;
};

// `count` elements in 64; the others stay what they were.
template <typename T>
VV_INLINE const T* part_of(const T* row, int64_t count, T room[kPanel]) {
  if (row != nullptr) memcpy(room, row, static_cast<size_t>(count) * sizeof(T));
  return row == nullptr ? nullptr : room;
}

template <typename T>
VV_INLINE T* place_in(const RowTensor& tensor, int64_t sample, int64_t token, int64_t column) {
  return tensor.data == nullptr ? nullptr : row_of<T>(tensor, sample, token) + column;
}

constexpr int64_t kAskedRows = 16;  // of the result, ahead of the one that is written

template <typename T>
VV_INLINE void ask_for_panel(const T* row) {
  for (int i = 0; i < kPanel; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + i, 1);
}

VV_INLINE int64_t step_of(const RowTensor& tensor) { return tensor.data == nullptr ? 0 : tensor.token_stride; }

// Rows [begin, end) of a tile, all of one sample, the first one being its token `token`. The results of a panel are
// far from each other in memory: lines are asked for some rows ahead.
template <Activation kActivation, typename T, typename Args, typename Sum>
VV_INLINE void finish_rows(const Args& args, const Tile& tile, const Sum& sum, int64_t begin, int64_t end,
                           int64_t sample, int64_t token) {
  float gate_part[kPanel] = {};
  T residual_part[kPanel] = {}, out_part[kPanel];
  const int64_t gate_step = step_of(args.gate), residual_step = step_of(args.residual), step = args.out.token_stride;
  const float* gate = place_in<const float>(args.gate, sample, token, tile.column);
  const T* residual = place_in<const T>(args.residual, sample, token, tile.column);
  T* out = place_in<T>(args.out, sample, token, tile.column);
  for (int64_t i = 0; i < kAskedRows && i < end - begin; ++i) ask_for_panel(out + i * step);
  for (int64_t n = begin; n < end; ++n, gate += gate_step, residual += residual_step, out += step) {
    const auto row = [&sum, n](int i) { return sum(n, i); };
    if (n + kAskedRows < end) ask_for_panel(out + kAskedRows * step);
    if (tile.columns == kPanel) {
      finish_panel<kActivation>(row, gate, residual, out);
    } else {
      const float* gates = part_of(gate, tile.columns, gate_part);
      const T* residuals = part_of(residual, tile.columns, residual_part);
      finish_panel<kActivation>(row, gates, residuals, out_part);
      memcpy(out, out_part, static_cast<size_t>(tile.columns) * sizeof(T));
    }
  }
}

// sum(row, i): of a row of the tile, as finish_panel takes it. Args: of a linear.
template <Activation kActivation, typename T, typename Args, typename Sum>
static void finish_tile(const Args& args, const Tile& tile, const Sum& sum) {
  int64_t sample = tile.row / args.shape.tokens, token = tile.row % args.shape.tokens;
  for (int64_t n = 0; n < tile.rows; ++sample, token = 0) {
    const int64_t left = args.shape.tokens - token, end = n + left < tile.rows ? n + left : tile.rows;
    finish_rows<kActivation, T>(args, tile, sum, n, end, sample, token);
    n = end;
  }
}

template <typename T, typename Args, typename Sum>
static void finish_tile_of(const Args& args, const Tile& tile, const Sum& sum) {
  switch (args.activation) {
    case Activation::kGelu:
      return finish_tile<Activation::kGelu, T>(args, tile, sum);
    case Activation::kGeluTanh:
      return finish_tile<Activation::kGeluTanh, T>(args, tile, sum);
    case Activation::kSilu:
      return finish_tile<Activation::kSilu, T>(args, tile, sum);
    default:
      return finish_tile<Activation::kNone, T>(args, tile, sum);
  }
}

template <typename Args, typename Sum>
VV_INLINE void finish(const Args& args, const Tile& tile, const Sum& sum) {
  args.out.dtype == Dtype::kFloat32 ? finish_tile_of<float>(args, tile, sum)
                                    : finish_tile_of<uint16_t>(args, tile, sum);
}

// Depth of the blocks whose sums are added in a second level.
template <typename T>
constexpr int64_t kDepthBlock = sizeof(T) == 4 ? 512 : 1024;

template <typename T>
static void multiply_tile(const LinearArgs& args, const LinearSplit& split, const Tile& tile, float* sums) {
  const int64_t depth = args.shape.width, padded = (depth + kPair<T> - 1) / kPair<T> * kPair<T>;
  const T* x = row_of<const T>(args.x, tile.row / args.shape.tokens, tile.row % args.shape.tokens);
  const T* panel = static_cast<const T*>(args.weight.data) + tile.column * padded;
  const int units = static_cast<int>((tile.columns + kUnit - 1) / kUnit);
  int64_t k = 0;
  do {  // a depth of 0 has sums too
    const int64_t block = depth - k < kDepthBlock<T> ? depth - k : kDepthBlock<T>;
    const T *here = panel + k * kPanel, *next = here + block * kPanel;  // at the end of a panel begins the next one
    multiply<T>({x + k, split.stride, here, kPanel, block, sums, kPanel, k > 0, reinterpret_cast<const char*>(next)},
                tile.rows, units);
    k += block;
  } while (k < depth);
}

VV_INLINE Tile tile_of(const LinearSplit& split, int64_t all_columns, int64_t task) {
  const int64_t panel = task / (split.groups * split.blocks), rest = task % (split.groups * split.blocks);
  const int64_t column = panel * kPanel, row = rest % split.blocks * split.block_rows;
  const int64_t rows_left = split.group_rows - row, columns_left = all_columns - column;
  return {rest / split.blocks * split.group_rows + row, rows_left < split.block_rows ? rows_left : split.block_rows,
          column, columns_left < kPanel ? columns_left : kPanel};
}

// The first place in `scratch` that is aligned to 64 bytes.
template <typename T>
VV_INLINE T* aligned(float* scratch) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
}

static void linear_task(const LinearArgs& args, int64_t task, float* scratch) {
  const LinearSplit split = split_rows(args.x, args.shape, args.weight.columns);
  const Tile tile = tile_of(split, args.weight.columns, task);
  float* sums = aligned<float>(scratch);
  args.weight.dtype == Dtype::kFloat32 ? multiply_tile<float>(args, split, tile, sums)
                                       : multiply_tile<uint16_t>(args, split, tile, sums);
  float bias[kPanel] = {};
  part_of(args.bias == nullptr ? nullptr : args.bias + tile.column, tile.columns, bias);
  finish(args, tile, [&](int64_t row, int i) { return load(sums + row * kPanel + i) + load(bias + i); });
}

}  // namespace vivace::VV_NAMESPACE
