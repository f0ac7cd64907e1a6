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

// What happens to the sums of a row on their way out: 64 columns.
template <Activation kActivation, typename T>
VV_INLINE void finish_panel(const float* sums, const float* bias, const float* gate, const T* residual, T* out) {
  for (int i = 0; i < kPanel; i += kBlock) {
    F x[kVectors], y[kVectors];
    for (int u = 0; u < kVectors; ++u) x[u] = load(sums + i + u * kLanes) + load(bias + i + u * kLanes);
    activate<kActivation, kVectors, T>(x, y);
    for (int u = 0; u < kVectors; ++u) {
      const int at = i + u * kLanes;
      if (gate != nullptr) y[u] = y[u] * load(gate + at);
      if (residual != nullptr) y[u] = load_row(residual + at) + y[u];
      store_row(out + at, y[u]);
    }
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

// `sums`: [rows, 64]. Args: of a linear.
template <Activation kActivation, typename T, typename Args>
static void finish_tile(const Args& args, const Tile& tile, const float* sums) {
  float bias[kPanel] = {}, gate_part[kPanel] = {};
  T residual_part[kPanel] = {}, out_part[kPanel];
  if (args.bias != nullptr) part_of(args.bias + tile.column, tile.columns, bias);
  int64_t sample = tile.row / args.shape.tokens, token = tile.row % args.shape.tokens;
  for (int64_t i = 0; i < tile.rows; ++i, sums += kPanel) {
    const float* gate = place_in<const float>(args.gate, sample, token, tile.column);
    const T* residual = place_in<const T>(args.residual, sample, token, tile.column);
    T* out = place_in<T>(args.out, sample, token, tile.column);
    if (tile.columns == kPanel) {
      finish_panel<kActivation>(sums, bias, gate, residual, out);
    } else {
      gate = part_of(gate, tile.columns, gate_part);
      residual = part_of(residual, tile.columns, residual_part);
      finish_panel<kActivation>(sums, bias, gate, residual, out_part);
      memcpy(out, out_part, static_cast<size_t>(tile.columns) * sizeof(T));
    }
    if (++token == args.shape.tokens) token = 0, ++sample;
  }
}

template <typename T, typename Args>
static void finish_tile_of(const Args& args, const Tile& tile, const float* sums) {
  switch (args.activation) {
    case Activation::kGelu:
      return finish_tile<Activation::kGelu, T>(args, tile, sums);
    case Activation::kGeluTanh:
      return finish_tile<Activation::kGeluTanh, T>(args, tile, sums);
    case Activation::kSilu:
      return finish_tile<Activation::kSilu, T>(args, tile, sums);
    default:
      return finish_tile<Activation::kNone, T>(args, tile, sums);
  }
}

template <typename Args>
VV_INLINE void finish(const Args& args, const Tile& tile, const float* sums) {
  args.out.dtype == Dtype::kFloat32 ? finish_tile_of<float>(args, tile, sums)
                                    : finish_tile_of<uint16_t>(args, tile, sums);
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
  finish(args, tile, sums);
}

}  // namespace vivace::VV_NAMESPACE
