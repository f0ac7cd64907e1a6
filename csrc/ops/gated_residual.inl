// The gated residual of a row.
//
// Floor: three rows moved. The gate of a sample is read from the first-level cache.

namespace vivace::VV_NAMESPACE {

template <typename T>
VV_INLINE void add_gated(const T* hidden, const T* update, const float* gate, T* out, int64_t width) {
  if (gate == nullptr) {
    each_vector(width, [&](auto load_at, auto store_at) { store_at(out, load_at(hidden) + load_at(update)); });
  } else {
    each_vector(width,
                [&](auto load_at, auto store_at) { store_at(out, load_at(hidden) + load_at(gate) * load_at(update)); });
  }
}

// The gate of a row, kept from row to row where samples share it.
class Gate {
 public:
  Gate(const RowTensor& gate, int64_t width, float* scratch) : gate_(gate), width_(width), scratch_(scratch) {}

  const float* at(int64_t sample, int64_t token) {
    if (gate_.data == nullptr) return nullptr;
    if (row_ == nullptr || gate_.token_stride != 0) row_ = float_row(gate_, sample, token, width_, scratch_);
    return row_;
  }

 private:
  const RowTensor& gate_;
  int64_t width_;
  float* scratch_;
  const float* row_ = nullptr;
};

template <typename T>
VV_INLINE void residual_row(const GatedResidualArgs& args, int64_t sample, int64_t token, const float* gate) {
  add_gated(row_of<const T>(args.hidden, sample, token), row_of<const T>(args.update, sample, token), gate,
            row_of<T>(args.out, sample, token), args.shape.width);
}

template <typename T>
static void residual_rows(const GatedResidualArgs& args, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  Gate gate(args.gate, args.shape.width, scratch);
  for (int64_t token = begin; token < end; ++token) residual_row<T>(args, sample, token, gate.at(sample, token));
}

static void gated_residual_rows(const void* call, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const auto& args = *static_cast<const GatedResidualArgs*>(call);
  args.hidden.dtype == Dtype::kFloat32 ? residual_rows<float>(args, sample, begin, end, scratch)
                                       : residual_rows<uint16_t>(args, sample, begin, end, scratch);
}

}  // namespace vivace::VV_NAMESPACE
