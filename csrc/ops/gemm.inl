// The micro-kernels of products with packed matrices: 6 rows by 64 columns at a time (16 with AVX2), every sum in a
// register.
//
// Per step of depth, 24 multiply-adds wait for 4 loads of the panel and 6 of the rows: neither binds. A sum runs
// through the depth of one call in order; calls add to each other, so who cuts a long depth into blocks sums in two
// levels. float32 is multiplied and added with one rounding on every instruction set: the same bits. bfloat16 adds the
// products of a pair one after the other, the second element's first, each rounded once, as the dot product of AVX-512
// does, except that this one flushes subnormal numbers.

namespace vivace::VV_NAMESPACE {

constexpr int kGemmRows = 6;
constexpr int kUnit = 16;                        // columns the interface counts in
constexpr int kUnitVectors = kUnit / kLanes;     // vectors of a unit
constexpr int kMaxUnits = kLanes == 16 ? 4 : 1;  // units whose sums the registers hold
template <typename T>
constexpr int kPair = static_cast<int>(4 / sizeof(T));  // elements of depth that lie side by side in a panel

// c[i * c_stride + j] (+)= sum over k < depth of a[i * a_stride + k] * B[k][j]. `b` points at a panel, or at any
// multiple of 16 columns in it, of `pitch` columns: 64 for a PackedMatrix. A bfloat16 panel ends with a whole pair.
template <typename T>
struct Product {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t pitch, depth;
  float* c;
  int64_t c_stride;
  bool add;                    // to what c holds; else c is overwritten
  const char* next = nullptr;  // a panel's part of this size that is wanted afterwards, to be brought into the cache
};

// Asks for one line of `next` a step; where there is none, for one that is there.
class Ahead {
 public:
  Ahead(const char* next, const void* there)
      : at_(next == nullptr ? static_cast<const char*>(there) : next), line_(next == nullptr ? 0 : 64) {}
  void step() {
    __builtin_prefetch(at_);
    at_ += line_;
  }

 private:
  const char* at_;
  int64_t line_;
};

template <int kVectorsWide, int kRows>
VV_INLINE void put_sums(F (&sum)[kRows][kVectorsWide], float* c, int64_t stride, bool add) {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectorsWide; ++j) {
      float* to = c + i * stride + j * kLanes;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// sum[i][j] += x(i) * column(j).
template <int kRows, int kWide, typename Row, typename Column>
VV_INLINE void add_products(F (&sum)[kRows][kWide], const Row& x, const Column& column) {
  F b[kWide];
#pragma GCC unroll 16
  for (int j = 0; j < kWide; ++j) b[j] = column(j);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const F a = x(i);
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
  }
}

template <int kRows, int kUnits>
static void micro_kernel(const Product<float>& p) {
  constexpr int kWide = kUnits * kUnitVectors;
  F sum[kRows][kWide];
  for (auto& row : sum) {
    for (F& one : row) one = set1(0.0f);
  }
  const float *a = p.a, *b = p.b;
  const int64_t stride = p.a_stride, pitch = p.pitch;
  Ahead ahead(p.next, p.b);
  for (int64_t k = 0; k < p.depth; ++k, b += pitch) {
    ahead.step();
    add_products(sum, [&](int i) { return set1(a[i * stride + k]); }, [&](int j) { return load(b + j * kLanes); });
  }
  put_sums(sum, p.c, p.c_stride, p.add);
}

// Two neighbours of a row as one word; `last`: the second one is not there and counts as zero.
VV_INLINE U row_pair(const uint16_t* a, bool last) {
  uint32_t word = *a;
  if (!last) memcpy(&word, a, sizeof(word));
  return set1u(word);
}

#if VV_ISA == VV_AVX512_BF16
template <int kRows, int kWide>
VV_INLINE void add_pairs(F (&sum)[kRows][kWide], const uint16_t* a, int64_t stride, const uint16_t* b, bool last) {
  __m512bh column[kWide];
#pragma GCC unroll 4
  for (int j = 0; j < kWide; ++j) column[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 2 * j * kLanes));
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const auto x = reinterpret_cast<__m512bh>(row_pair(a + i * stride, last).x);
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[i][j] = {_mm512_dpbf16_ps(sum[i][j].x, x, column[j])};
  }
}
#else
template <int kRows, int kWide>
VV_INLINE void add_pairs(F (&sum)[kRows][kWide], const uint16_t* a, int64_t stride, const uint16_t* b, bool last) {
  const auto second = [](U pair) { return from_bits(pair & set1u(0xffff0000u)); };
  const auto first = [](U pair) { return from_bits(shift_left<16>(pair)); };
  const auto row = [&](int i) { return row_pair(a + i * stride, last); };
  const auto column = [&](int j) { return load_words(b + 2 * j * kLanes); };
  add_products(sum, [&](int i) { return second(row(i)); }, [&](int j) { return second(column(j)); });
  add_products(sum, [&](int i) { return first(row(i)); }, [&](int j) { return first(column(j)); });
}
#endif

template <int kRows, int kUnits>
static void micro_kernel(const Product<uint16_t>& p) {
  constexpr int kWide = kUnits * kUnitVectors;
  F sum[kRows][kWide];
  for (auto& row : sum) {
    for (F& one : row) one = set1(0.0f);
  }
  const uint16_t *a = p.a, *b = p.b;
  const int64_t stride = p.a_stride, step = 2 * p.pitch;
  Ahead ahead(p.next, p.b);
  int64_t k = 0;
  for (; k + 1 < p.depth; k += 2, b += step) {
    ahead.step();
    add_pairs(sum, a + k, stride, b, false);
  }
  if (k < p.depth) add_pairs(sum, a + k, stride, b, true);
  put_sums(sum, p.c, p.c_stride, p.add);
}

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

// body(Rows<n>) for strips of n = kMost <= 6 rows, then for the rest.
template <int kMost, typename Body>
VV_INLINE void each_strip(int64_t rows, const Body& body) {
  for (; rows >= kMost; rows -= kMost) body(Rows<kMost>{});
  switch (rows) {
    case 5:
      return body(Rows<5>{});
    case 4:
      return body(Rows<4>{});
    case 3:
      return body(Rows<3>{});
    case 2:
      return body(Rows<2>{});
    case 1:
      return body(Rows<1>{});
    default:
      return;
  }
}

// A step of depth reads four lines of a panel and asks for one, so the first four strips ask for all of `next`.
template <int kUnits, typename T>
static void multiply_rows(Product<T> p, int64_t rows) {
  int asked = 0;
  each_strip<kGemmRows>(rows, [&](auto strip) {
    constexpr int kRows = decltype(strip)::value;
    micro_kernel<kRows, kUnits>(p);
    p.a += kRows * p.a_stride, p.c += kRows * p.c_stride;
    if (p.next != nullptr) p.next = ++asked < 4 ? p.next + p.depth / kPair<T> * 64 : nullptr;
  });
}

// The product of `rows` rows and 16 * `units` columns.
template <typename T>
static void multiply(Product<T> p, int64_t rows, int units) {
  for (; units > 0; units -= kMaxUnits) {
    if constexpr (kMaxUnits == 1) {
      multiply_rows<1>(p, rows);
    } else if (units >= kMaxUnits) {
      multiply_rows<4>(p, rows);
    } else {
      units == 3 ? multiply_rows<3>(p, rows) : units == 2 ? multiply_rows<2>(p, rows) : multiply_rows<1>(p, rows);
    }
    p.b += kMaxUnits * kUnit * kPair<T>, p.c += kMaxUnits * kUnit;
    p.next = nullptr;
  }
}

}  // namespace vivace::VV_NAMESPACE
