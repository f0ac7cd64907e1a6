// Rows of some tokens copied side by side, and normalised while they are in the first-level cache.
//
// Floor: each row read once and written once, or twice with its norm.

namespace vivace::VV_NAMESPACE {

// The `count` ids of a row of the batch.
VV_INLINE const int32_t* ids_of(const TokenIds& ids, int64_t sample, int64_t count) {
  return ids.ids + sample % ids.samples * count;
}

template <typename T, bool kCentred>
static void gather_normed(const GatherTokensArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const NormModulateArgs norm{args.out,    args.scale, args.shift,   args.weight, args.bias,
                              args.normed, args.shape, args.centred, args.eps};
  const int64_t width = args.shape.width;
  const int32_t* ids = ids_of(args.ids, sample, args.shape.tokens);
  Modulation modulation(norm, scratch);
  for (int64_t m = begin; m < end; ++m) {
    const T* x = row_of<const T>(args.x, sample, ids[m]);
    const T* next = m + 1 < end ? row_of<const T>(args.x, sample, ids[m + 1]) : nullptr;
    memcpy(row_of<T>(args.out, sample, m), x, static_cast<size_t>(width) * sizeof(T));
    modulation.move_to(sample, m);
    norm_row<kCentred>(x, next, row_of<T>(args.normed, sample, m), modulation.a(), modulation.c(), width, args.eps);
  }
}

template <typename T>
static void gather_rows(const GatherTokensArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  if (args.normed.data != nullptr) {
    return args.centred ? gather_normed<T, true>(args, sample, begin, end, scratch)
                        : gather_normed<T, false>(args, sample, begin, end, scratch);
  }
  const int32_t* ids = ids_of(args.ids, sample, args.shape.tokens);
  for (int64_t m = begin; m < end; ++m) {
    memcpy(row_of<T>(args.out, sample, m), row_of<const T>(args.x, sample, ids[m]),
           static_cast<size_t>(args.shape.width) * sizeof(T));
  }
}

static void gather_tokens_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const GatherTokensArgs*>(call);
  args.x.dtype == Dtype::kFloat32 ? gather_rows<float>(args, sample, begin, end, scratch)
                                  : gather_rows<uint16_t>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
