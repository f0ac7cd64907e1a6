// Normalisation, modulation and the integers of a row, which lies in scratch memory between them; nowhere, if its scale
// is given.

namespace vivace::VV_NAMESPACE {

// put(load, store, y smooth) for every vector y of the row normalised and modulated.
template <bool kCentred, typename T, typename Put>
VV_INLINE void each_smooth(const T* x, const RowNorm& norm, const Modulation& modulation, const float* smooth,
                           int64_t width, const Put& put) {
  if (smooth == nullptr) {
    each_normal<kCentred>(x, norm, modulation.a(), modulation.c(), width, put);
  } else {
    each_normal<kCentred>(x, norm, modulation.a(), modulation.c(), width,
                          [&](auto load_at, auto store_at, F y) { put(load_at, store_at, y * load_at(smooth)); });
  }
}

// A row's sums are taken before the row ahead of it is divided, which hides how long both take to begin.
template <bool kCentred, typename T>
static void int8_norm_rows_of(const Int8NormModulateArgs& args, int64_t sample, int64_t begin, int64_t end,
                              float* scratch) {
  const NormModulateArgs& norm = args.norm;
  const int64_t width = norm.shape.width, first = sample * norm.shape.tokens;
  const float given = args.given == nullptr ? 0.0f : args.given[sample];
  const auto at = [&](int64_t token) { return row_of<const T>(norm.hidden, sample, token); };
  const auto sums = [&](int64_t token) {
    if (token == end) return RowNorm{};
    return norm_of<kCentred>(at(token), token + 1 < end ? at(token + 1) : nullptr, width, norm.eps);
  };
  RowDivisor divisor;
  const bool at_once = one_pass(given, divisor);
  Modulation modulation(norm, scratch);
  RowNorm now = sums(begin);
  for (int64_t token = begin; token < end; ++token) {
    int8_t* q = args.q + (first + token) * width;
    float* scale = args.scale + first + token;
    modulation.move_to(sample, token);
    const auto each = [&](const auto& put) {
      each_smooth<kCentred>(at(token), now, modulation, args.smooth, width, put);
    };
    if (at_once) {
      const RowNorm next = sums(token + 1);
      const auto body = [&](const auto& put) {
        each([&](auto load_at, auto store_at, F y) {
          store_at(scratch, y);
          put(store_at, load_at(scratch));  // not y, which may have lanes beyond the row
        });
      };
      write_given(body, width, divisor, q, scale);
      now = next;
      continue;
    }
    U most = set1u(0);
    each([&](auto load_at, auto store_at, F y) {
      store_at(scratch, y);
      most = max(most, magnitude(load_at(scratch)));  // not of y, which may have lanes beyond the row
    });
    now = sums(token + 1);
    write_integers(PlainRow<float>{scratch}, static_cast<const float*>(nullptr), width, max_lanes(most), given, q,
                   scale);
  }
}

template <bool kCentred>
static void int8_norm_rows(const Int8NormModulateArgs& args, int64_t sample, int64_t begin, int64_t end,
                           float* scratch) {
  args.norm.hidden.dtype == Dtype::kFloat32 ? int8_norm_rows_of<kCentred, float>(args, sample, begin, end, scratch)
                                            : int8_norm_rows_of<kCentred, uint16_t>(args, sample, begin, end, scratch);
}

static void int8_norm_modulate_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const Int8NormModulateArgs*>(call);
  args.norm.centred ? int8_norm_rows<true>(args, sample, begin, end, scratch)
                    : int8_norm_rows<false>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
