// GELU of a row, x times Phi(x) or times its approximation by a hyperbolic tangent.
//
// "none": Phi(x) = 1/2 + x P(x^2) / Q(x^2), with x limited to where that is 0 and 1 to the last bit. "tanh":
// gelu(x) = x / (1 + 2^t), t = -2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3), which does not cancel in the negative tail.
// Both tails, infinities and NaN come out as in the definition, without a branch.
//
// Fits are the best in the maximum norm, coefficients rounded to float32 one after another; bfloat16 has short ones.
// Largest errors before rounding: of Phi 1e-8, short 2.2e-6 (half a unit of the result down to x = -3); of 2^r 9e-8,
// short 1e-4, relative.
//
// Floor: bytes moved. In cache the number of operations decides, some 27 a vector. Tried for "none", ns an element of
// float32 on one Zen 5 core: x / (1 + 2^t) with t a polynomial of degree 15: 0.35; the same by pairs (Estrin): 0.26;
// P/Q of 2 | 4 | 6 | 8 vectors side by side: 0.19 | 0.17 | 0.17 | 0.16.

namespace vivace::VV_NAMESPACE {

template <typename T>
struct GeluTerms;
template <>
struct GeluTerms<float> {
  static constexpr float kLimit = 0x1.5ffca4p+2f;
  static constexpr float kP[] = {0x1.988450p-2f,  0x1.162de6p-5f,  0x1.32fa10p-8f,
                                 0x1.64554ep-13f, 0x1.aaec08p-18f, 0x1.85bdb0p-26f};
  static constexpr float kQ[] = {1.0f,           0x1.01d3cep-2f, 0x1.d6554ap-6f, 0x1.efa284p-10f, 0x1.366474p-14f,
                                 0x1.41224ep-20f};
  static constexpr float kExp2[] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9c2p-3f,
                                    0x1.c6b6d8p-5f, 0x1.3ce8acp-7f, 0x1.5bda40p-10f};
};
template <>
struct GeluTerms<uint16_t> {
  static constexpr float kLimit = 0x1.36efaap+2f;
  static constexpr float kP[] = {0x1.988200p-2f, 0x1.c95246p-6f, 0x1.ee5baap-9f, 0x1.08f1dcp-15f};
  static constexpr float kQ[] = {1.0f, 0x1.e483a8p-3f, 0x1.87c790p-6f, 0x1.2787ecp-10f};
  static constexpr float kExp2[] = {1.0f, 0x1.62f5fap-1f, 0x1.f00c4cp-3f, 0x1.c2a250p-5f};
};

// Vectors computed side by side: as many as registers hold.
constexpr int kChains = kLanes == 16 ? 8 : 4;

constexpr float kTanh[] = {-0x1.26aec2p+1f, -0x1.a5a7d0p-4f};  // -2 sqrt(2 / pi) log2(e) (1, 0.044715)

// y = polynomial in x, lowest coefficient first, of N vectors at a time.
template <int N, int kTerms>
VV_INLINE void horner(const float (&c)[kTerms], const F x[N], F y[N]) {
  for (int u = 0; u < N; ++u) y[u] = x[u] * set1(c[kTerms - 1]) + set1(c[kTerms - 2]);
#pragma GCC unroll 8
  for (int k = kTerms - 3; k >= 0; --k) {
    for (int u = 0; u < N; ++u) y[u] = y[u] * x[u] + set1(c[k]);
  }
}

// y = 2^t. t is split into the nearest integer, which adding 1.5 * 2^23 leaves in the lowest bits, and a rest. At
// t = 128 the rest is 0, so the exponent becomes that of infinity and the fraction stays 0. Below 2^-126 it is 2^-126
// or less, which 1 + 2^t does not show.
#if VV_ISA == VV_AVX512_BF16
template <int N, typename T>
VV_INLINE void exp2(const F t[N], F y[N]) {
  constexpr int kNearest = 8;
  F r[N];
  for (int u = 0; u < N; ++u) r[u] = {_mm512_reduce_ps(t[u].x, kNearest)};
  horner<N>(GeluTerms<T>::kExp2, r, y);
  for (int u = 0; u < N; ++u) y[u] = {_mm512_scalef_ps(y[u].x, _mm512_roundscale_ps(t[u].x, kNearest))};
}
#else
template <int N, typename T>
VV_INLINE void exp2(const F t[N], F y[N]) {
  const F magic = set1(0x1.8p+23f);
  F shifted[N], r[N];
  for (int u = 0; u < N; ++u) {
    const F near = clamp(t[u], set1(-126.0f), set1(128.0f));
    shifted[u] = near + magic;
    r[u] = near - (shifted[u] - magic);
  }
  horner<N>(GeluTerms<T>::kExp2, r, y);
  for (int u = 0; u < N; ++u) y[u] = from_bits(bits(y[u]) + shift_left<23>(bits(shifted[u])));
}
#endif

template <int N, typename T>
VV_INLINE void gelu_by_tanh(const F x[N], F y[N]) {
  F square[N], t[N];
  for (int u = 0; u < N; ++u) square[u] = x[u] * x[u];
  horner<N>(kTanh, square, t);
  for (int u = 0; u < N; ++u) t[u] = t[u] * x[u];
  exp2<N, T>(t, y);
  for (int u = 0; u < N; ++u) y[u] = x[u] / (y[u] + set1(1.0f));
}

template <int N, typename T>
VV_INLINE void gelu_by_erf(const F x[N], F y[N]) {
  const F limit = set1(GeluTerms<T>::kLimit), minus = set1(-GeluTerms<T>::kLimit);
  F near[N], square[N], p[N], q[N];
  for (int u = 0; u < N; ++u) {
    near[u] = clamp(x[u], minus, limit);
    square[u] = near[u] * near[u];
  }
  horner<N>(GeluTerms<T>::kP, square, p);
  horner<N>(GeluTerms<T>::kQ, square, q);
  for (int u = 0; u < N; ++u) y[u] = (near[u] * p[u] / q[u] + set1(0.5f)) * x[u];
}

template <int N, typename T, bool kByTanh>
VV_INLINE void gelu_vectors(const F x[N], F y[N]) {
  kByTanh ? gelu_by_tanh<N, T>(x, y) : gelu_by_erf<N, T>(x, y);
}

// A block in any order, the same for load and store.
VV_INLINE void load_block(const float* p, F x[kChains]) {
  for (int u = 0; u < kChains; ++u) x[u] = load(p + u * kLanes);
}
VV_INLINE void load_block(const uint16_t* p, F x[kChains]) {
  for (int u = 0; u < kChains; u += 2) load_pairs_bf16(p + u * kLanes, x[u], x[u + 1]);
}
VV_INLINE void store_block(float* p, const F y[kChains]) {
  for (int u = 0; u < kChains; ++u) store(p + u * kLanes, y[u]);
}
VV_INLINE void store_block(uint16_t* p, const F y[kChains]) {
  for (int u = 0; u < kChains; u += 2) store_pairs_bf16(p + u * kLanes, y[u], y[u + 1]);
}

template <typename T, bool kByTanh, bool kGated>
static void gelu_row(const T* hidden, const T* gate, T* out, int64_t width) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= width; i += kChains * kLanes) {
    F x[kChains], y[kChains];
    load_block((kGated ? gate : hidden) + i, x);
    gelu_vectors<kChains, T, kByTanh>(x, y);
    if (kGated) {
      load_block(hidden + i, x);
      for (int u = 0; u < kChains; ++u) y[u] = x[u] * y[u];
    }
    store_block(out + i, y);
  }
  each_vector(width - i, [&](auto load_at, auto store_at) {
    const F x[1] = {load_at((kGated ? gate : hidden) + i)};
    F y[1];
    gelu_vectors<1, T, kByTanh>(x, y);
    store_at(out + i, kGated ? load_at(hidden + i) * y[0] : y[0]);
  });
}

template <typename T, bool kByTanh>
static void gelu_rows_of(const GeluArgs& args, int64_t sample, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* hidden = row_of<const T>(args.hidden, sample, token);
    T* out = row_of<T>(args.out, sample, token);
    if (args.gate.data == nullptr) {
      gelu_row<T, kByTanh, false>(hidden, nullptr, out, args.shape.width);
    } else {
      gelu_row<T, kByTanh, true>(hidden, row_of<const T>(args.gate, sample, token), out, args.shape.width);
    }
  }
}

static void gelu_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float*) {
  const auto& args = *static_cast<const GeluArgs*>(call);
  if (args.hidden.dtype == Dtype::kFloat32) {
    args.tanh ? gelu_rows_of<float, true>(args, sample, begin, end)
              : gelu_rows_of<float, false>(args, sample, begin, end);
  } else {
    args.tanh ? gelu_rows_of<uint16_t, true>(args, sample, begin, end)
              : gelu_rows_of<uint16_t, false>(args, sample, begin, end);
  }
}

}  // namespace vivace::VV_NAMESPACE
