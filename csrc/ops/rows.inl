// Rows of float32, bfloat16 or int8 elements: vectors loaded and stored by the type of the pointer, whole or in part.

namespace vivace::VV_NAMESPACE {

VV_INLINE F load_row(const float* p) { return load(p); }
VV_INLINE F load_row(const uint16_t* p) { return load_bf16(p); }
VV_INLINE F load_row(const int8_t* p) { return to_float_signed(load_bytes(p)); }
VV_INLINE void store_row(float* p, F a) { store(p, a); }
VV_INLINE void store_row(uint16_t* p, F a) { store_bf16(p, a); }

// The first `count` elements, fewer than a vector; zero for the others.
template <typename T>
VV_INLINE F load_part(const T* p, int64_t count) {
  T part[kLanes] = {};
  memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load_row(part);
}

template <typename T, typename Value>
VV_INLINE void store_part(T* p, int64_t count, Value a) {
  T part[kLanes];
  store_row(part, a);
  memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
}

// body(i, load, store) for every vector of a row: whole ones, then what is left. load(p) reads elements i.. of the row
// p, store(p, y) writes them.
template <typename Body>
VV_INLINE void each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    body([i](const auto* p) { return load_row(p + i); }, [i](auto* p, auto y) { store_row(p + i, y); });
  }
  if (kLanes > 1 && i < width) {
    const int64_t count = width - i;
    body([=](const auto* p) { return load_part(p + i, count); }, [=](auto* p, auto y) { store_part(p + i, count, y); });
  }
}

template <typename T>
VV_INLINE T* row_of(const RowTensor& tensor, int64_t sample, int64_t token) {
  return static_cast<T*>(tensor.data) + sample * tensor.sample_stride + token * tensor.token_stride;
}

// A row of a vector as float32: where it lies, or widened into `scratch`.
VV_INLINE const float* float_row(const RowTensor& tensor, int64_t sample, int64_t token, int64_t width,
                                 float* scratch) {
  if (tensor.dtype == Dtype::kFloat32) return row_of<float>(tensor, sample, token);
  const uint16_t* halves = row_of<uint16_t>(tensor, sample, token);
  each_vector(width, [&](auto load_at, auto store_at) { store_at(scratch, load_at(halves)); });
  return scratch;
}

}  // namespace vivace::VV_NAMESPACE
