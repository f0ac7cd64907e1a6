// Products of 8-bit integers: 6 rows by 64 columns at a time with AVX-512 VNNI, 4 by 16 with AVX2 (AVX-512F alone has
// no arithmetic on 16-bit numbers), int32 sums that nothing saturates.
//
// The dot product of VNNI takes one operand from [0, 255]: rows are moved there by 128, and 128 times the sum of the
// column is taken off at the end. AVX2 would saturate on pairs of such products, so there the numbers are widened to 16
// bits, those at even and at odd places of four neighbours apart, whose pairs of products fit int32.

namespace vivace::VV_NAMESPACE {

#if VV_ISA == VV_AVX512_BF16
constexpr int kIntLanes = 16, kInt8Rows = 6;
constexpr int32_t kMoved = 128;
struct Ints {
  __m512i x;
};
using Quads = Ints;  // four neighbours a lane
VV_INLINE Ints no_ints() { return {_mm512_setzero_si512()}; }
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
VV_INLINE Ints no_ints() { return {_mm256_setzero_si256()}; }
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
VV_INLINE Ints no_ints() { return {0}; }
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

// c[i * kPanel + j] = sum over k < depth of a[i * a_stride + k] * B[k][j], and what kMoved adds to it; `b` as in
// Product, of a panel of 64.
struct Int8Product {
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t depth;
  int32_t* c;
};

// Four neighbours of a row, or as many as there are.
VV_INLINE int32_t row_word(const int8_t* a, int64_t count) {
  int32_t word = 0;
  memcpy(&word, a, count < 4 ? static_cast<size_t>(count) : 4);
  return word;
}

template <int kRows, int kWide>
VV_INLINE void add_quads(Ints (&sum)[kRows][kWide], const int8_t* a, int64_t stride, const int8_t* b, int64_t count) {
  Quads column[kWide];
#pragma GCC unroll 16
  for (int j = 0; j < kWide; ++j) column[j] = column_quads(b + 4 * j * kIntLanes);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const Quads row = row_quads(row_word(a + i * stride, count));
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) sum[i][j] = add_dot(sum[i][j], row, column[j]);
  }
}

template <int kRows, int kUnits>
static void int8_kernel(const Int8Product& p) {
  constexpr int kWide = kUnits * kUnit / kIntLanes;
  Ints sum[kRows][kWide];
  for (auto& row : sum) {
    for (Ints& one : row) one = no_ints();
  }
  const int8_t *a = p.a, *b = p.b;
  int64_t k = 0;
  for (; k + 4 <= p.depth; k += 4, b += 4 * kPanel) add_quads(sum, a + k, p.a_stride, b, 4);
  if (k < p.depth) add_quads(sum, a + k, p.a_stride, b, p.depth - k);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) store_ints(p.c + i * kPanel + j * kIntLanes, sum[i][j]);
  }
}

template <int kUnits>
static void int8_multiply_rows(Int8Product p, int64_t rows) {
  each_strip<kInt8Rows>(rows, [&](auto strip) {
    constexpr int kRows = decltype(strip)::value;
    int8_kernel<kRows, kUnits>(p);
    p.a += kRows * p.a_stride, p.c += kRows * kPanel;
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
    p.b += 4 * kMost * kUnit, p.c += kMost * kUnit;
  }
}

// Sums times both scales, in place.
static void scale_tile(const Int8LinearArgs& args, const Tile& tile, const int32_t* column_sums, int32_t* sums) {
  alignas(64) float scale[kPanel] = {};
  alignas(64) int32_t moved[kPanel];
  memcpy(scale, args.weight_scale + tile.column, static_cast<size_t>(tile.columns) * sizeof(float));
  for (int j = 0; j < kPanel; ++j) moved[j] = kMoved * column_sums[j];
  const float* x_scale = args.x_scale + tile.row;
  for (int64_t i = 0; i < tile.rows; ++i, sums += kPanel) {
    const F row = set1(x_scale[i]);
    for (int j = 0; j < kPanel; j += kLanes) {
      U both, offset;
      memcpy(&both, sums + j, sizeof(both));
      memcpy(&offset, moved + j, sizeof(offset));
      const F y = to_float_signed(both - offset) * row * load(scale + j);
      memcpy(sums + j, &y, sizeof(y));
    }
  }
}

static void int8_linear_task(const Int8LinearArgs& args, int64_t task, float* scratch) {
  const LinearSplit split = split_rows(args.x, args.shape, args.weight.columns);
  const Tile tile = tile_of(split, args.weight.columns, task);
  const int64_t padded = (args.shape.width + 3) / 4 * 4;
  const auto* panels = static_cast<const int8_t*>(args.weight.data);
  const auto* column_sums = reinterpret_cast<const int32_t*>(panels + split.panels * kPanel * padded);
  const int8_t* x = row_of<const int8_t>(args.x, tile.row / args.shape.tokens, tile.row % args.shape.tokens);
  int32_t* sums = aligned<int32_t>(scratch);
  int8_multiply({x, split.stride, panels + tile.column * padded, args.shape.width, sums}, tile.rows,
                static_cast<int>((tile.columns + kUnit - 1) / kUnit));
  scale_tile(args, tile, column_sums + tile.column, sums);
  finish(args, tile, reinterpret_cast<const float*>(sums));
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

static void products(Dtype dtype) { dtype == Dtype::kFloat32 ? float_products<float>() : float_products<uint16_t>(); }

}  // namespace vivace::VV_NAMESPACE
