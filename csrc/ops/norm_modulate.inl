// Normalisation and modulation of a row.
//
// A row of D <= 4096 stays in the first-level cache between its passes, so memory is read once. Sums have one order:
// elements i and i + 32 of every 64 are added first, then into 32 partial sums, which a tree adds up; the last 64 are
// padded with what adds nothing.
//
// Floor: two rows moved at copy bandwidth. Measured on one core (Zen 5, AVX-512), a layer norm with modulation,
// ns a row: float32 D = 384 / 1152 / 3072 68 / 139 / 956, bfloat16 98 / 223 / 593. What was tried:
// - asking for the next row while the squares are summed: 164 to 139 and 1186 to 956 for float32, nothing at D = 384;
// - widening a bfloat16 row once, into memory: 4 % at best, not worth the copy.
//
// The mean of a row is rounded, and what it is off by would show where the mean is large: the squares are taken about
// it, with the sum of the differences beside them, which corrects both (Chan, Golub and LeVeque 1983, "corrected
// two-pass").

namespace vivace::VV_NAMESPACE {

constexpr int kSums = 32;
constexpr int kSumVectors = kSums / kLanes;

VV_INLINE float tree_sum(F v[kSumVectors]) {
#pragma GCC unroll 5
  for (int half = kSumVectors / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) v[u] = v[u] + v[u + half];
  }
  return sum_lanes(v[0]);
}

// sums[t] = sum over the row of terms(x, t); `pad` is an element whose terms are zero. Asks for the row at `next`, when
// there is one, so that it is there when its turn comes.
template <int kTerms, typename T, typename Terms>
VV_INLINE void sum_row(const T* x, const T* next, int64_t width, float pad, const Terms& terms, float sums[kTerms]) {
  F total[kTerms][kSumVectors];
  for (int t = 0; t < kTerms; ++t) {
    for (int u = 0; u < kSumVectors; ++u) total[t][u] = set1(0.0f);
  }
  const auto add = [&](const auto* p) {
    for (int u = 0; u < kSumVectors; ++u) {
      const F a = load_row(p + u * kLanes), b = load_row(p + kSums + u * kLanes);
      F first[kTerms], second[kTerms];
      terms(a, first), terms(b, second);
      for (int t = 0; t < kTerms; ++t) total[t][u] = total[t][u] + (first[t] + second[t]);
    }
  };
  int64_t i = 0;
  for (; i + 2 * kSums <= width; i += 2 * kSums) {
    if (next != nullptr) {
      for (int line = 0; line < 2 * kSums; line += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(next + i + line);
    }
    add(x + i);
  }
  if (i < width) {
    float rest[2 * kSums];
    for (int l = 0; l < 2 * kSums; ++l) rest[l] = pad;
    each_vector(width - i, [&](auto load_at, auto store_at) { store_at(rest, load_at(x + i)); });
    add(rest);
  }
  for (int t = 0; t < kTerms; ++t) sums[t] = tree_sum(total[t]);
}

// norm = ((x - mean) - rest) * gain
struct RowNorm {
  float mean, rest, gain;
};

template <bool kCentred, typename T>
VV_INLINE RowNorm norm_of(const T* x, const T* next, int64_t width, double eps) {
  const double count = static_cast<double>(width);
  float sums[2];
  if (!kCentred) {
    sum_row<1>(x, next, width, 0.0f, [](F v, F* term) { term[0] = v * v; }, sums);
    return {0.0f, 0.0f, static_cast<float>(1.0 / __builtin_sqrt(sums[0] / count + eps))};
  }
  sum_row<1, T>(x, nullptr, width, 0.0f, [](F v, F* term) { term[0] = v; }, sums);
  const float mean = static_cast<float>(sums[0] / count);
  const F middle = set1(mean);
  const auto about_mean = [&](F v, F* term) {
    term[0] = v - middle;
    term[1] = term[0] * term[0];
  };
  sum_row<2>(x, next, width, mean, about_mean, sums);
  const double rest = sums[0] / count, variance = sums[1] / count - rest * rest;
  const double positive = variance < 0.0 ? 0.0 : variance;  // a constant row; NaN stays
  return {mean, static_cast<float>(rest), static_cast<float>(1.0 / __builtin_sqrt(positive + eps))};
}

// put(load, store, y) for every vector y of the row normalised and modulated, with load and store of its place.
template <bool kCentred, typename T, typename Put>
VV_INLINE void each_normal(const T* x, const RowNorm& norm, const float* a, const float* c, int64_t width,
                           const Put& put) {
  const F mean = set1(norm.mean), rest = set1(norm.rest), gain = set1(norm.gain);
  const auto normal = [&](F v) { return (kCentred ? (v - mean) - rest : v) * gain; };
  if (a == nullptr) {
    each_vector(width, [&](auto load_at, auto store_at) { put(load_at, store_at, normal(load_at(x))); });
  } else {
    each_vector(width, [&](auto load_at, auto store_at) {
      put(load_at, store_at, normal(load_at(x)) * load_at(a) + load_at(c));
    });
  }
}

template <bool kCentred, typename T, typename Out>
VV_INLINE void norm_row(const T* x, const T* next, Out* out, const float* a, const float* c, int64_t width,
                        double eps) {
  each_normal<kCentred>(x, norm_of<kCentred>(x, next, width, eps), a, c, width,
                        [=](auto, auto store_at, F y) { store_at(out, y); });
}

// a and c of a row, kept from row to row where the rows of a sample share them; null where nothing is given.
class Modulation {
 public:
  Modulation(const NormModulateArgs& args, float* scratch) : args_(args), scratch_(scratch) {
    given_ = args.scale.data || args.shift.data || args.weight.data || args.bias.data;
    by_token_ = (args.scale.data && args.scale.token_stride) || (args.shift.data && args.shift.token_stride);
  }

  void move_to(int64_t sample, int64_t token) {
    if (!given_ || (made_ && !by_token_)) return;
    made_ = true;
    const int64_t width = args_.shape.width;
    const auto fill = [&](float* row, float value) {
      for (int64_t i = 0; i < width; ++i) row[i] = value;
    };
    const auto row = [&](const RowTensor& vector) { return float_row(vector, sample, token, width, scratch_); };
    float *const a = scratch_ + width, *const c = a + width;
    fill(a, 1.0f);
    fill(c, 0.0f);
    if (args_.scale.data) combine(a, row(args_.scale), a, [](F one, F s, F) { return one + s; });
    if (args_.bias.data) combine(c, row(args_.bias), a, [](F, F b, F by) { return b * by; });
    if (args_.shift.data) combine(c, row(args_.shift), a, [](F sum, F s, F) { return sum + s; });
    if (args_.weight.data) combine(a, row(args_.weight), a, [](F by, F w, F) { return by * w; });
  }

  const float* a() const { return given_ ? scratch_ + args_.shape.width : nullptr; }
  const float* c() const { return given_ ? scratch_ + 2 * args_.shape.width : nullptr; }

 private:
  // to = body(to, vector, other), element by element.
  template <typename Body>
  void combine(float* to, const float* vector, const float* other, const Body& body) const {
    each_vector(args_.shape.width,
                [&](auto load_at, auto store_at) { store_at(to, body(load_at(to), load_at(vector), load_at(other))); });
  }

  const NormModulateArgs& args_;
  float* scratch_;
  bool given_, by_token_, made_ = false;
};

template <bool kCentred, typename T, typename Out>
VV_INLINE void norm_row_of(const NormModulateArgs& args, int64_t sample, int64_t token, const T* next,
                           Modulation& modulation) {
  modulation.move_to(sample, token);
  norm_row<kCentred>(row_of<const T>(args.hidden, sample, token), next, row_of<Out>(args.out, sample, token),
                     modulation.a(), modulation.c(), args.shape.width, args.eps);
}

template <bool kCentred, typename T, typename Out>
static void norm_rows(const NormModulateArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  Modulation modulation(args, scratch);
  for (int64_t token = begin; token < end; ++token) {
    const T* next = token + 1 < end ? row_of<const T>(args.hidden, sample, token + 1) : nullptr;
    norm_row_of<kCentred, T, Out>(args, sample, token, next, modulation);
  }
}

template <bool kCentred>
static void norm_rows_of(const NormModulateArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  if (args.hidden.dtype == Dtype::kBfloat16) {
    norm_rows<kCentred, uint16_t, uint16_t>(args, sample, begin, end, scratch);
  } else if (args.out.dtype == Dtype::kBfloat16) {
    norm_rows<kCentred, float, uint16_t>(args, sample, begin, end, scratch);
  } else {
    norm_rows<kCentred, float, float>(args, sample, begin, end, scratch);
  }
}

static void norm_modulate_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const NormModulateArgs*>(call);
  args.centred ? norm_rows_of<true>(args, sample, begin, end, scratch)
               : norm_rows_of<false>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
