// Keeping a row: planes while f is in registers, then the residual, from the first-level cache.
//
// Floor: fresh and base, `made` planes and hidden read, `made` + 1 planes and out written.

namespace vivace::VV_NAMESPACE {

// f of a row, called with the load of a place.
template <typename T, bool kBase>
struct FreshRow {
  const T *fresh, *base;
  template <typename Load>
  F operator()(const Load& load_at) const {
    return kBase ? load_at(fresh) - load_at(base) : load_at(fresh);
  }
};

// Where the planes of a row lie.
struct Planes {
  int64_t made, width, stride;  // between planes
  float* scale;                 // int8: of plane 0
  int64_t scale_stride;
  float* scratch;  // int8: a row of floats
};

template <typename K, typename Row>
VV_INLINE void keep_row(const Row& row, K* first, const Planes& planes) {
  each_vector(planes.width, [&](auto load_at, auto store_at) {
    F next = row(load_at);
    K* plane = first;
    for (int64_t j = 0; j < planes.made; ++j, plane += planes.stride) {
      const F old = load_at(plane);
      store_at(plane, next);
      next = next - old;
    }
    store_at(plane, next);
  });
}

// Integers of `row` over the old ones, and what it differs from those by; returns the bits of the largest difference.
template <bool kDivide>
VV_INLINE uint32_t write_differences(const float* row, int64_t width, const RowDivisor& divisor, float before,
                                     int8_t* q, float* differences) {
  U most = set1u(0);
  each_vector(width, [&](auto load_at, auto store_at) {
    const F x = load_at(row), difference = x - load_at(q) * set1(before);
    store_at(q, quotient<kDivide, kDivide>(x, divisor));
    store_at(differences, difference);
    most = max(most, magnitude(difference));
  });
  return max_lanes(most);
}

// As above, `most`: the bits of the largest |x| of the row. One that is not finite leaves differences that are not.
VV_INLINE uint32_t replace_integers(const float* row, uint32_t most, int64_t width, int8_t* q, float* scale,
                                    float* differences) {
  if (most >= kInfinity) {
    write_nothing(width, q, scale);
    return most;
  }
  const RowDivisor divisor = row_divisor(most, 0.0f);
  const float before = *scale;
  *scale = divisor.step;
  return divisor.divide ? write_differences<true>(row, width, divisor, before, q, differences)
                        : write_differences<false>(row, width, divisor, before, q, differences);
}

// A row of float32 that is there already is not copied.
template <typename Row>
VV_INLINE const float* widened(const Row& row, int64_t width, float* scratch) {
  each_vector(width, [&](auto load_at, auto store_at) { store_at(scratch, row(load_at)); });
  return scratch;
}
VV_INLINE const float* widened(const FreshRow<float, false>& row, int64_t, float*) { return row.fresh; }

template <typename Row>
VV_INLINE void keep_row(const Row& row, int8_t* q, const Planes& planes) {
  const float* next = widened(row, planes.width, planes.scratch);
  float* scale = planes.scale;
  uint32_t most = largest_bits(PlainRow<float>{next}, planes.width);
  for (int64_t j = 0; j < planes.made; ++j, q += planes.stride, scale += planes.scale_stride) {
    most = replace_integers(next, most, planes.width, q, scale, planes.scratch);
    next = planes.scratch;
  }
  write_integers(PlainRow<float>{next}, static_cast<const float*>(nullptr), planes.width, most, 0.0f, q, scale);
}

// Hidden states of H, fresh ones of T.
template <typename H, typename T, bool kBase>
VV_INLINE void add_row(const CacheUpdateArgs& args, int64_t sample, int64_t token, const FreshRow<T, kBase>& row,
                       const float* gate) {
  add_made(row_of<const H>(args.hidden, sample, token), gate, row_of<H>(args.out, sample, token), args.shape.width,
           row);
}

template <typename T, bool kBase>
static void update_rows(const CacheUpdateArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const int64_t tokens = kept_tokens(args.kept, args.shape.tokens), width = args.shape.width;
  Planes planes{args.made, width, tokens * width, nullptr, tokens, scratch + width};
  Gate gate(args.gate, width, scratch);
  for (int64_t token = begin; token < end; ++token) {
    const FreshRow<T, kBase> row{row_of<const T>(args.fresh, sample, token),
                                 kBase ? row_of<const T>(args.base, sample, token) : nullptr};
    const int64_t at = kept_token(args.kept, args.shape.tokens, sample, token);
    if (args.kept.dtype == Dtype::kInt8) planes.scale = args.kept.rows[sample].scales + at;
    with_kept(args.kept, sample, at * width, [&](auto* plane) { keep_row(row, plane, planes); });
    if (args.hidden.data == nullptr) continue;
    args.hidden.dtype == Dtype::kFloat32 ? add_row<float>(args, sample, token, row, gate.at(sample, token))
                                         : add_row<uint16_t>(args, sample, token, row, gate.at(sample, token));
  }
}

static void cache_update_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const CacheUpdateArgs*>(call);
  const bool base = args.base.data != nullptr;
  if (args.fresh.dtype == Dtype::kFloat32) {
    base ? update_rows<float, true>(args, sample, begin, end, scratch)
         : update_rows<float, false>(args, sample, begin, end, scratch);
  } else {
    base ? update_rows<uint16_t, true>(args, sample, begin, end, scratch)
         : update_rows<uint16_t, false>(args, sample, begin, end, scratch);
  }
}

}  // namespace vivace::VV_NAMESPACE
