// The metric of every pixel of a sample: of its channels, each a weighted sum of planes. Products, sums, quotients and
// roots are rounded one by one, sums in order, so lanes are pixels and nothing is added across them.
//
// Floor: the planes read once; the deviation reads them twice, the second time mostly from the first-level cache.

namespace vivace::VV_NAMESPACE {

template <typename T>
struct PlaneSums {
  const T* plane[kMostPlanes];
  const float* weights;
  int64_t count, pixels;

  // v of a channel.
  template <typename Load>
  F operator()(int64_t channel, const Load& load_at) const {
    F sum = set1(weights[0]) * load_at(plane[0] + channel * pixels);
    for (int64_t j = 1; j < count; ++j) sum = sum + set1(weights[j]) * load_at(plane[j] + channel * pixels);
    return sum;
  }
};

// The metric of a vector of pixels; v(c) are their values in channel c.
template <typename Values>
VV_INLINE F pixel_metric(TokenMetric metric, int64_t channels, const Values& v) {
  const auto sum_of = [channels](const auto& term) {
    F sum = term(0);
    for (int64_t c = 1; c < channels; ++c) sum = sum + term(c);
    return sum;
  };
  const auto squares_about = [&](F mean) {
    return sum_of([&](int64_t c) {
      const F part = v(c) - mean;
      return part * part;
    });
  };
  if (metric == TokenMetric::kNorm) {
    return sqrt(sum_of([&](int64_t c) {
      const F part = v(c);
      return part * part;
    }));
  }
  if (channels == 1) return from_bits(bits(v(0)) & set1u(0x7fffffffu));
  const F mean = sum_of(v) / set1(static_cast<float>(channels));
  return sqrt(squares_about(mean) / set1(static_cast<float>(channels - 1)));
}

template <typename T>
static void pixel_metrics_of(const SelectTokensArgs& args, int64_t sample, int64_t pixels, float* to) {
  PlaneSums<T> sums{{}, args.weights + sample * args.plane_count, args.plane_count, pixels};
  for (int64_t j = 0; j < args.plane_count; ++j)
    sums.plane[j] = static_cast<const T*>(args.planes[j]) + sample * args.plane_strides[j];
  each_vector(pixels, [&](auto load_at, auto store_at) {
    store_at(to, pixel_metric(args.metric, args.channels, [&](int64_t c) { return sums(c, load_at); }));
  });
}

static void pixel_metrics(const SelectTokensArgs& args, int64_t sample, int64_t pixels, float* to) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return pixel_metrics_of<float>(args, sample, pixels, to);
    case Dtype::kBfloat16:
      return pixel_metrics_of<uint16_t>(args, sample, pixels, to);
    default:
      return pixel_metrics_of<Half>(args, sample, pixels, to);
  }
}

}  // namespace vivace::VV_NAMESPACE
