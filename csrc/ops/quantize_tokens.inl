// A row as 8-bit integers with one scale: its largest |x| first, then the quotients, from the first-level cache. Where
// the scale is given both are one pass.
//
// The largest |x| is found among bits, as unsigned integers: their order is that of the numbers, infinity and NaN above
// all others, so that one maximum tells the scale and whether the row is finite.
//
// x / scale is computed without dividing, as x rest + x by with by + rest = 1 / scale, rounded once by an FMA. Before
// rounding this is off by less than 2^-47 of itself, so it gives another integer than the quotient only where x / scale
// lies that near the middle between a tie k + 1/2 (k < 127) and the float next to it. Let b in [2^23, 2^24) be the
// mantissa of the scale. That middle times b has the binary places of x and, besides, b 2^(e-24) with 2^e <= k + 1/2 <
// 2^(e+1), e <= 6: x comes that near only if b lies within 4 of a multiple of 2^(23-e), so of 2^17. csrc/tests try all
// such b with all x next to all ties: none differs.

namespace vivace::VV_NAMESPACE {

constexpr float kMostInt8 = 127.0f;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr int64_t kAheadBytes = 9216;  // longest row to ask for ahead of its turn: three of them in the cache

// Elements rounded to the nearest integer, half to even, of |a| < 2^22: adding 1.5 * 2^23 leaves it in the lowest bits.
VV_INLINE void store_row(int8_t* p, F a) { store_bytes(p, bits(a + set1(0x1.8p+23f))); }

VV_INLINE U magnitude(F a) { return bits(a) & set1u(0x7fffffffu); }

// A row as it lies, or times `smooth`; called with the load of a place it makes a vector.
template <typename T>
struct PlainRow {
  const T* x;
  template <typename Load>
  F operator()(const Load& load_at) const {
    return load_at(x);
  }
};
template <typename T>
struct SmoothRow {
  const T* x;
  const float* smooth;
  template <typename Load>
  F operator()(const Load& load_at) const {
    return load_at(x) * load_at(smooth);
  }
};

template <typename T>
VV_INLINE void ask_for(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// The bits of the largest |x| of a row.
template <typename Row>
VV_INLINE uint32_t largest_bits(const Row& row, int64_t width) {
  constexpr int kStep = 4 * kLanes;
  U most[4] = {set1u(0), set1u(0), set1u(0), set1u(0)};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    for (int u = 0; u < 4; ++u)
      most[u] = max(most[u], magnitude(row([&](const auto* p) { return load_row(p + i + u * kLanes); })));
  }
  each_vector(width - i, [&](auto load_at, auto) {
    most[0] = max(most[0], magnitude(row([&](const auto* p) { return load_at(p + i); })));
  });
  return max_lanes(max(max(most[0], most[1]), max(most[2], most[3])));
}

// Of bfloat16, two at a time: a shift drops what lies before one of them, what lies behind decides between equals.
VV_INLINE uint32_t largest_bits(const PlainRow<uint16_t>& row, int64_t width) {
  constexpr int kStep = 2 * kLanes;
  U odd = set1u(0), even = set1u(0);
  const auto add = [&](const uint16_t* p) {
    const U both = load_words(p);
    odd = max(odd, shift_left<1>(both)), even = max(even, shift_left<17>(both));
  };
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    add(row.x + i);
  }
  uint16_t rest[kStep] = {};
  memcpy(rest, row.x + i, static_cast<size_t>(width - i) * sizeof(uint16_t));
  add(rest);
  return max_lanes(max(odd & set1u(0xfffe0000u), even)) >> 1;
}

struct RowDivisor {
  float step;      // the scale
  float by, rest;  // their sum is 1 / step
  bool divide;     // by step: products may leave the range of numbers
};

// `most`: the largest |x| to be divided.
VV_INLINE RowDivisor divisor_of(float step, float most) {
  const bool plain = step > 0x1p-100f && step < 0x1p+100f && most < step * 0x1p+22f;
  const double inverse = 1.0 / static_cast<double>(step);
  const auto by = static_cast<float>(inverse);
  return {step, by, static_cast<float>(inverse - static_cast<double>(by)), kLanes == 1 || !plain};
}

template <bool kDivide, bool kCut>
VV_INLINE F quotient(F x, const RowDivisor& divisor) {
  const F y = kDivide ? x / set1(divisor.step) : fma(x, set1(divisor.by), x * set1(divisor.rest));
  return kCut ? clamp(y, set1(-kMostInt8), set1(kMostInt8)) : y;
}

// Asks for the row at `next`, if there is one.
template <bool kDivide, bool kCut, typename Row, typename T>
VV_INLINE void write_quotients(const Row& row, const T* next, int64_t width, const RowDivisor& divisor, int8_t* q) {
  constexpr int kStep = 4 * kLanes;
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    if (next != nullptr) ask_for(next + i, kStep);
    for (int u = 0; u < 4; ++u) {
      const F x = row([&](const auto* p) { return load_row(p + i + u * kLanes); });
      store_row(q + i + u * kLanes, quotient<kDivide, kCut>(x, divisor));
    }
  }
  each_vector(width - i, [&](auto load_at, auto store_at) {
    store_at(q + i, quotient<kDivide, kCut>(row([&](const auto* p) { return load_at(p + i); }), divisor));
  });
}

// A row with NaN or infinity.
VV_INLINE void write_nothing(int64_t width, int8_t* q, float* scale) {
  memset(q, 0, static_cast<size_t>(width));
  *scale = __builtin_nanf("");
}

// By the own scale of a finite row whose largest |x| has these bits, or by the one given where that is above 0.
VV_INLINE RowDivisor row_divisor(uint32_t most, float given) {
  float largest;
  memcpy(&largest, &most, 4);
  const float own = largest / kMostInt8;
  return divisor_of(given > 0.0f ? given : own == 0.0f ? 1.0f : own, largest);
}

// The integers and the scale of a row whose largest |x| has these bits; given: its scale, or not above 0.
template <typename Row, typename T>
VV_INLINE void write_integers(const Row& row, const T* next, int64_t width, uint32_t most, float given, int8_t* q,
                              float* scale) {
  if (most >= kInfinity) return write_nothing(width, q, scale);
  const RowDivisor divisor = row_divisor(most, given);
  *scale = divisor.step;
  if (divisor.divide || given > 0.0f) {
    write_quotients<true, true>(row, next, width, divisor, q);
  } else {
    write_quotients<false, false>(row, next, width, divisor, q);
  }
}

// Whether rows of any numbers can be multiplied, cut off and looked at for NaN in one pass.
VV_INLINE bool one_pass(float given, RowDivisor& divisor) {
  divisor = divisor_of(given, 0.0f);
  return given > 0x1p-20f && !divisor.divide;
}

// body(put) calls put(store, x) for every vector of a row.
template <typename Body>
VV_INLINE void write_given(const Body& body, int64_t width, const RowDivisor& divisor, int8_t* q, float* scale) {
  U most = set1u(0);
  body([&](auto store_at, F x) {
    most = max(most, magnitude(x));
    store_at(q, quotient<false, true>(x, divisor));
  });
  *scale = divisor.step;
  if (max_lanes(most) >= kInfinity) write_nothing(width, q, scale);
}

// A row's maximum is looked for before the row ahead of it is divided, which hides how long both take to begin.
template <typename T, typename MakeRow>
VV_INLINE void quantize_rows_of(const QuantizeTokensArgs& args, int64_t sample, int64_t begin, int64_t end,
                                const MakeRow& make_row) {
  const int64_t width = args.shape.width, first = sample * args.shape.tokens;
  const float given = args.given == nullptr ? 0.0f : args.given[sample];
  const auto at = [&](int64_t token) { return row_of<const T>(args.x, sample, token); };
  RowDivisor divisor;
  if (one_pass(given, divisor)) {
    for (int64_t token = begin; token < end; ++token) {
      const auto each = [&, row = make_row(at(token))](const auto& put) {
        each_vector(width, [&](auto load_at, auto store_at) { put(store_at, row(load_at)); });
      };
      write_given(each, width, divisor, args.q + (first + token) * width, args.scale + first + token);
    }
    return;
  }
  const bool ahead = width * static_cast<int64_t>(sizeof(T)) <= kAheadBytes;
  const auto largest = [&](int64_t token) { return token < end ? largest_bits(make_row(at(token)), width) : 0; };
  uint32_t most = largest(begin);
  for (int64_t token = begin; token < end; ++token) {
    const uint32_t next = largest(token + 1);
    const int64_t row = first + token;
    write_integers(make_row(at(token)), ahead && token + 2 < end ? at(token + 2) : nullptr, width, most, given,
                   args.q + row * width, args.scale + row);
    most = next;
  }
}

template <typename T>
static void quantize_rows(const QuantizeTokensArgs& args, int64_t sample, int64_t begin, int64_t end) {
  if (args.smooth == nullptr) {
    quantize_rows_of<T>(args, sample, begin, end, [](const T* x) { return PlainRow<T>{x}; });
  } else {
    quantize_rows_of<T>(args, sample, begin, end, [&](const T* x) { return SmoothRow<T>{x, args.smooth}; });
  }
}

static void quantize_tokens_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float*) {
  const auto& args = *static_cast<const QuantizeTokensArgs*>(call);
  args.x.dtype == Dtype::kFloat32 ? quantize_rows<float>(args, sample, begin, end)
                                  : quantize_rows<uint16_t>(args, sample, begin, end);
}

}  // namespace vivace::VV_NAMESPACE
