// A copy with non-temporal stores; dst aligned to 64 bytes, the rest of a block copied plainly.

namespace vivace::VV_NAMESPACE {

static void copy_stream(void* dst, const void* src, int64_t bytes) {
  float* to = static_cast<float*>(dst);
  const float* from = static_cast<const float*>(src);
  const int64_t count = bytes / 4;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    F v[kVectors];
    for (int u = 0; u < kVectors; ++u) v[u] = load(from + i + u * kLanes);
    for (int u = 0; u < kVectors; ++u) stream(to + i + u * kLanes, v[u]);
  }
  memcpy(to + i, from + i, static_cast<size_t>(bytes - i * 4));
  stream_fence();
}

}  // namespace vivace::VV_NAMESPACE
