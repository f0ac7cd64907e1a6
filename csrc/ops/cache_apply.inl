// A weighted sum of planes of a row, added to the hidden states or alone.
//
// Floor: `terms` planes and hidden read, out written.

namespace vivace::VV_NAMESPACE {

// The planes of a row and their weights.
template <typename K>
struct PlaneRow {
  const K* first;
  int64_t stride;      // between planes
  const float* scale;  // int8: of plane 0
  int64_t scale_stride;
  const float* weights;
  int64_t terms;

  // Plane j times its weight.
  template <typename Load>
  F term(int64_t j, const Load& load_at) const {
    const F plane = load_at(first + j * stride);
    return set1(weights[j]) * (sizeof(K) == 1 && scale != nullptr ? plane * set1(scale[j * scale_stride]) : plane);
  }

  template <typename Load>
  F operator()(const Load& load_at) const {
    F sum = term(0, load_at);
    for (int64_t j = 1; j < terms; ++j) sum = sum + term(j, load_at);
    return sum;
  }
};

template <typename T, typename K>
VV_INLINE void apply_row(const CacheApplyArgs& args, int64_t sample, int64_t token, int64_t at, const K* plane,
                         Gate& gate) {
  const int64_t tokens = kept_tokens(args.kept, args.shape.tokens), width = args.shape.width;
  const float* scale = args.kept.dtype == Dtype::kInt8 ? args.kept.rows[sample].scales + at : nullptr;
  const PlaneRow<K> row{plane, tokens * width, scale, tokens, args.weights + sample * args.terms, args.terms};
  T* out = row_of<T>(args.out, sample, token);
  if (args.hidden.data == nullptr) {
    each_vector(width, [&](auto load_at, auto store_at) { store_at(out, row(load_at)); });
  } else {
    add_made(row_of<const T>(args.hidden, sample, token), gate.at(sample, token), out, width, row);
  }
}

template <typename T>
static void apply_rows(const CacheApplyArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  Gate gate(args.gate, args.shape.width, scratch);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = kept_token(args.kept, args.shape.tokens, sample, token);
    with_kept(args.kept, sample, at * args.shape.width,
              [&](const auto* plane) { apply_row<T>(args, sample, token, at, plane, gate); });
  }
}

static void cache_apply_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const CacheApplyArgs*>(call);
  args.out.dtype == Dtype::kFloat32 ? apply_rows<float>(args, sample, begin, end, scratch)
                                    : apply_rows<uint16_t>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
