// The two halves on one row after the other: the norm finds h in the first-level cache.

namespace vivace::VV_NAMESPACE {

template <bool kCentred, typename T>
static void adaln_rows(const AdalnModulateArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  Gate gate(args.residual.gate, args.residual.shape.width, scratch);
  Modulation modulation(args.norm, scratch + args.residual.shape.width);
  for (int64_t token = begin; token < end; ++token) {
    residual_row<T>(args.residual, sample, token, gate.at(sample, token));
    const T* next = token + 1 < end ? row_of<const T>(args.residual.update, sample, token + 1) : nullptr;
    norm_row_of<kCentred, T, T>(args.norm, sample, token, next, modulation);
  }
}

static void adaln_modulate_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const AdalnModulateArgs*>(call);
  const bool wide = args.norm.hidden.dtype == Dtype::kFloat32;
  if (args.norm.centred) {
    wide ? adaln_rows<true, float>(args, sample, begin, end, scratch)
         : adaln_rows<true, uint16_t>(args, sample, begin, end, scratch);
  } else {
    wide ? adaln_rows<false, float>(args, sample, begin, end, scratch)
         : adaln_rows<false, uint16_t>(args, sample, begin, end, scratch);
  }
}

}  // namespace vivace::VV_NAMESPACE
