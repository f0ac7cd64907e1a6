// Rows of some tokens written where they belong among all.
//
// Floor: each row read once and written once; with a sum, hidden read besides.

namespace vivace::VV_NAMESPACE {

// Elements of a row, in the dtype of where they go.
template <typename T>
VV_INLINE void put_row(T* to, const T* from, int64_t width) {
  memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}
template <typename T, typename K>
VV_INLINE void put_row(K* to, const T* from, int64_t width) {
  each_vector(width, [&](auto load_at, auto store_at) { store_at(to, load_at(from)); });
}

template <typename K, typename T>
VV_INLINE void put_sum(K* to, const T* hidden, const float* gate, const T* fresh, int64_t width) {
  if (gate == nullptr) {
    each_vector(width, [&](auto load_at, auto store_at) { store_at(to, load_at(hidden) + load_at(fresh)); });
  } else {
    each_vector(width,
                [&](auto load_at, auto store_at) { store_at(to, load_at(hidden) + load_at(gate) * load_at(fresh)); });
  }
}

template <typename K, typename T>
static void scatter_rows(const ScatterTokensArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const int32_t* ids = ids_of(args.ids, sample, args.shape.tokens);
  const int64_t width = args.shape.width, first = args.second.data == nullptr ? width : args.first;
  K* full = args.full_at == nullptr ? row_of<K>(args.full, sample, 0) : static_cast<K*>(args.full_at[sample]);
  Gate gate(args.gate, width, scratch);
  for (int64_t m = begin; m < end; ++m) {
    K* to = full + ids[m] * args.full.token_stride;
    const T* fresh = row_of<const T>(args.fresh, sample, m);
    if (args.hidden.data != nullptr) {
      put_sum(to, row_of<const T>(args.hidden, sample, m), gate.at(sample, m), fresh, width);
      continue;
    }
    put_row(to, fresh, first);
    if (first < width) put_row(to + first, row_of<const T>(args.second, sample, m), width - first);
  }
}

template <typename K>
static void scatter_rows_into(const ScatterTokensArgs& args, int64_t sample, int64_t begin, int64_t end,
                              float* scratch) {
  args.fresh.dtype == Dtype::kFloat32 ? scatter_rows<K, float>(args, sample, begin, end, scratch)
                                      : scatter_rows<K, uint16_t>(args, sample, begin, end, scratch);
}

static void scatter_tokens_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const ScatterTokensArgs*>(call);
  args.full.dtype == Dtype::kFloat32 ? scatter_rows_into<float>(args, sample, begin, end, scratch)
                                     : scatter_rows_into<uint16_t>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
