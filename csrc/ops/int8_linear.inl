// Products of 8-bit integers: 6 rows by 64 columns at a time with AVX-512 VNNI, 4 by 16 with AVX2 (AVX-512F alone has
// no arithmetic on 16-bit numbers), int32 sums that nothing saturates. Scales, bias and all that follows are one pass
// from the sums of a block of rows, which are in the first-level cache, to the result.
//
// The dot product of VNNI takes one operand from [0, 255]: rows are moved there by 128, and sums begin with what that
// adds, 128 times the sum of the column, taken off. AVX2 would saturate on pairs of such products, so there the numbers
// are widened to 16 bits, those at even and at odd places of four neighbours apart, whose pairs of products fit int32.
//
// Floor: dot products, 256 operations a cycle of AVX-512. Tried on one Zen 5 core that has 950 GOP/s, mean of the four
// linears of DiT-XL/2 at 256, 512 and 1024 rows with bias, GELU, gate and residual: 838, products alone 883.
// - Sums in a function of their own, without a loop for the rest of the depth: as before; inlined into the task the
//   compiler moves them to memory, 330.
// - Blocks of as many rows as fit half of the second-level cache, panel after panel: 3 to 8 % more at 1024 rows.
// - Asking for the next panel: 1 to 4 % more. Into the second-level cache instead of the first: alike.
// - Asking for results 16 rows ahead of writing them: 2 to 5 % more; at the start of a strip of rows, or results
//   written strip by strip, asked for 40 steps earlier: less.
// - Instructions that round to bfloat16 and split exponents: 4 % more where there is a GELU.
// - Nothing: rows moved by 128 beforehand instead of at every load; 12 by 32 and 14 by 32 sums; rows side by side.
// - Asking for all lines of a tile's result, one a step of its last strip of rows: between 1 % less and 2 % more on one
//   thread and on two; then not asking for them while results are written: alike.

namespace vivace::VV_NAMESPACE {

#if VV_ISA == VV_AVX512_BF16
constexpr int kIntLanes = 16, kInt8Rows = 6;
constexpr int32_t kMoved = 128;
struct Ints {
  __m512i x;
};
using Quads = Ints;  // four neighbours a lane
VV_INLINE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
VV_INLINE void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.x); }
VV_INLINE Quads column_quads(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
VV_INLINE Quads row_quads(int32_t word) {
  return {_mm512_xor_si512(_mm512_set1_epi32(word), _mm512_set1_epi8(static_cast<char>(0x80)))};
}
VV_INLINE Ints add_dot(Ints sum, Quads row, Quads column) { return {_mm512_dpbusd_epi32(sum.x, row.x, column.x)}; }
#elif VV_ISA != VV_SCALAR
constexpr int kIntLanes = 8, kInt8Rows = 4;
constexpr int32_t kMoved = 0;
struct Ints {
  __m256i x;
};
struct Quads {
  __m256i even, odd;
};
VV_INLINE Ints load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
VV_INLINE void store_ints(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.x); }
VV_INLINE Quads widened(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
VV_INLINE Quads column_quads(const int8_t* p) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
VV_INLINE Quads row_quads(int32_t word) { return widened(_mm256_set1_epi32(word)); }
VV_INLINE Ints add_dot(Ints sum, Quads row, Quads column) {
  const __m256i even = _mm256_madd_epi16(row.even, column.even), odd = _mm256_madd_epi16(row.odd, column.odd);
  return {_mm256_add_epi32(sum.x, _mm256_add_epi32(even, odd))};
}
#else
constexpr int kIntLanes = 1, kInt8Rows = 4;
constexpr int32_t kMoved = 0;
struct Ints {
  int32_t x;
};
struct Quads {
  int8_t x[4];
};
VV_INLINE Ints load_ints(const int32_t* p) { return {*p}; }
VV_INLINE void store_ints(int32_t* p, Ints a) { *p = a.x; }
VV_INLINE Quads column_quads(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
VV_INLINE Quads row_quads(int32_t word) {
  Quads row;
  memcpy(row.x, &word, sizeof(word));
  return row;
}
VV_INLINE Ints add_dot(Ints sum, Quads row, Quads column) {
  for (int i = 0; i < 4; ++i) sum.x += row.x[i] * column.x[i];
  return sum;
}
#endif

// c[i * kPanel + j] = start[j] + sum over k < depth of a[i * a_stride + k] * B[k][j], and what kMoved adds to it; `b`
// and `next` as in Product.
struct Int8Product {
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t pitch, depth;
  const int32_t* start;
  int32_t* c;
  const char* next = nullptr;
};

template <int kRows, int kWide>
VV_INLINE void add_quads(Ints (&sum)[kRows][kWide], const int8_t* a, int64_t stride, const int8_t* b) {
  Quads column[kWide];
#pragma GCC unroll 16
  for (int j = 0; j < kWide; ++j) column[j] = column_quads(b + 4 * j * kIntLanes);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    int32_t word;
    memcpy(&word, a + i * stride, sizeof(word));
    const Quads row = row_quads(word);
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) sum[i][j] = add_dot(sum[i][j], row, column[j]);
  }
}

// Whole quads of the rows first, then what is left of them, filled up with zeros, by the same loop.
template <int kRows, int kUnits>
static __attribute__((noinline)) void int8_kernel(const Int8Product& p) {
  constexpr int kWide = kUnits * kUnit / kIntLanes;
  Ints sum[kRows][kWide];
  for (auto& row : sum) {
    for (int j = 0; j < kWide; ++j) row[j] = load_ints(p.start + j * kIntLanes);
  }
  const int64_t rest = p.depth % 4, whole = p.depth - rest, pitch = 4 * p.pitch;
  int8_t last[kRows * 4] = {};
  for (int i = 0; i < kRows && rest > 0; ++i)
    memcpy(last + 4 * i, p.a + i * p.a_stride + whole, static_cast<size_t>(rest));
  const int8_t *a = p.a, *b = p.b;
  int64_t stride = p.a_stride, steps = whole / 4;
  Ahead ahead(p.next, b);
  for (int parts = rest > 0 ? 2 : 1; parts > 0; --parts) {
    for (; steps > 0; --steps, a += 4, b += pitch) {
      ahead.step();
      add_quads(sum, a, stride, b);
    }
    a = last, stride = 4, steps = 1;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) store_ints(p.c + i * kPanel + j * kIntLanes, sum[i][j]);
  }
}

template <int kUnits>
static void int8_multiply_rows(Int8Product p, int64_t rows) {
  int asked = 0;
  each_strip<kInt8Rows>(rows, [&](auto strip) {
    constexpr int kRows = decltype(strip)::value;
    int8_kernel<kRows, kUnits>(p);
    p.a += kRows * p.a_stride, p.c += kRows * kPanel;
    if (p.next != nullptr) p.next = ++asked < 4 ? p.next + p.depth / 4 * 64 : nullptr;
  });
}

static void int8_multiply(Int8Product p, int64_t rows, int units) {
  constexpr int kMost = kIntLanes == 16 ? 4 : 1;
  for (; units > 0; units -= kMost) {
    if constexpr (kMost == 1) {
      int8_multiply_rows<1>(p, rows);
    } else if (units >= kMost) {
      int8_multiply_rows<4>(p, rows);
    } else {
      units == 3   ? int8_multiply_rows<3>(p, rows)
      : units == 2 ? int8_multiply_rows<2>(p, rows)
                   : int8_multiply_rows<1>(p, rows);
    }
    p.b += 4 * kMost * kUnit, p.c += kMost * kUnit, p.start += kMost * kUnit;
    p.next = nullptr;
  }
}

constexpr int64_t kInt8RowBytes = int64_t{1} << 19;  // of x that all panels are multiplied with before the next ones

// The tile of a task: so many blocks of rows, panel after panel, then the next ones.
VV_INLINE Tile int8_tile_of(const LinearSplit& split, const Int8LinearArgs& args, int64_t task) {
  const int64_t blocks = split.groups * split.blocks, fit = kInt8RowBytes / (split.block_rows * args.shape.width + 1);
  const int64_t parts = fit < 1 ? blocks : (blocks + fit - 1) / fit, most = (blocks + parts - 1) / parts;
  const int64_t part = task / (split.panels * most), rest = task % (split.panels * most);
  const int64_t left = blocks - part * most, count = left < most ? left : most;
  return tile_of(split, args.weight.columns, rest / count * blocks + part * most + rest % count);
}

static void int8_linear_task(const Int8LinearArgs& args, int64_t task, float* scratch) {
  const LinearSplit split = split_rows(args.x, args.shape, args.weight.columns);
  const Tile tile = int8_tile_of(split, args, task);
  const int64_t padded = (args.shape.width + 3) / 4 * 4;
  const auto* panels = static_cast<const int8_t*>(args.weight.data);
  const auto* column_sums = reinterpret_cast<const int32_t*>(panels + split.panels * kPanel * padded);
  const int8_t* x = row_of<const int8_t>(args.x, tile.row / args.shape.tokens, tile.row % args.shape.tokens);
  const int8_t *panel = panels + tile.column * padded, *next = panel + kPanel * padded;
  float scale[kPanel] = {}, bias[kPanel] = {};
  int32_t start[kPanel];
  part_of(args.weight_scale + tile.column, tile.columns, scale);
  part_of(args.bias == nullptr ? nullptr : args.bias + tile.column, tile.columns, bias);
  for (int j = 0; j < kPanel; ++j) start[j] = -kMoved * column_sums[tile.column + j];
  int32_t* sums = aligned<int32_t>(scratch);
  int8_multiply({x, split.stride, panel, kPanel, args.shape.width, start, sums, reinterpret_cast<const char*>(next)},
                tile.rows, static_cast<int>((tile.columns + kUnit - 1) / kUnit));
  const float* x_scale = args.x_scale + tile.row;
  finish(args, tile, [&](int64_t row, int i) {
    U sum;
    memcpy(&sum, sums + row * kPanel + i, sizeof(sum));
    return to_float_signed(sum) * set1(x_scale[row]) * load(scale + i) + load(bias + i);
  });
}

// --- the roofline ---------------------------------------------------------------------------------------------------

// Rows of one step of depth, again and again: the panel's line stays in registers or the first-level cache.
template <typename T>
static void float_products() {
  constexpr int kUnits = kMaxUnits, kSteps = 256;
  static const T row[kSteps] = {}, line[kPanel * kPair<T>] = {};
  alignas(64) float sums[kGemmRows * kPanel];
  constexpr int64_t kOnce = 2 * kGemmRows * kUnits * kUnit * kSteps;
  for (int64_t done = 0; done < kProductOperations; done += kOnce) {
    multiply_rows<kUnits>(Product<T>{row, 0, line, 0, kSteps, sums, kPanel, false}, kGemmRows);
    asm volatile("" : : "r"(sums) : "memory");  // as if somebody looked at them
  }
}

static void int8_products() {
  constexpr int kUnits = kIntLanes == 16 ? 4 : 1, kDepth = 1024;
  static const int8_t row[kDepth] = {}, line[kPanel * 4] = {};
  static const int32_t start[kPanel] = {};
  alignas(64) int32_t sums[kInt8Rows * kPanel];
  constexpr int64_t kOnce = 2 * kInt8Rows * kUnits * kUnit * kDepth;
  for (int64_t done = 0; done < kProductOperations; done += kOnce) {
    int8_multiply_rows<kUnits>({row, 0, line, 0, kDepth, start, sums}, kInt8Rows);
    asm volatile("" : : "r"(sums) : "memory");  // as if somebody looked at them
  }
}

static void products(Dtype dtype) {
  dtype == Dtype::kFloat32 ? float_products<float>()
  : dtype == Dtype::kInt8  ? int8_products()
                           : float_products<uint16_t>();
}

}  // namespace vivace::VV_NAMESPACE
