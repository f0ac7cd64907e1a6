// Normalisation and rotation of the heads of a token.
//
// A head is read twice, the second time from the first-level cache. Sums have one order on every instruction set:
// element i of a head is added in lane i mod 16, head after head where a norm covers all of them, and a tree adds the
// lanes up. The rounding of a mean is corrected as in norm_modulate.inl.
//
// Floor: bytes moved. Heads are short (64 or 128 channels), so what a head costs besides its elements counts: the tree,
// a square root, a division. Hence the norms of several heads first, which overlap, then their elements. One Zen 5
// core, in cache, ns an element of float32 | bfloat16, 64 channels: head after head 0.31 | 0.57; norms first, lambdas
// inlined by force: 0.22 | 0.21; groups unrolled besides: 0.27 | 0.29.

namespace vivace::VV_NAMESPACE {

constexpr int kGroup = 16;
constexpr int kParts = kGroup / kLanes;
constexpr int kHeads = 16;  // heads whose norms are taken at a time

struct Group {
  F v[kParts];
};

VV_INLINE Group operator+(const Group& a, const Group& b) {
  Group y;
  for (int u = 0; u < kParts; ++u) y.v[u] = a.v[u] + b.v[u];
  return y;
}
VV_INLINE Group operator-(const Group& a, const Group& b) {
  Group y;
  for (int u = 0; u < kParts; ++u) y.v[u] = a.v[u] - b.v[u];
  return y;
}
VV_INLINE Group operator*(const Group& a, const Group& b) {
  Group y;
  for (int u = 0; u < kParts; ++u) y.v[u] = a.v[u] * b.v[u];
  return y;
}
VV_INLINE Group all(float x) {
  Group y;
  for (int u = 0; u < kParts; ++u) y.v[u] = set1(x);
  return y;
}
VV_INLINE float sum(Group a) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) a.v[u] = a.v[u] + a.v[u + half];
  }
  return sum_lanes(a.v[0]);
}

template <typename T>
VV_INLINE Group load_group(const T* p) {
  Group y;
  for (int u = 0; u < kParts; ++u) y.v[u] = load_row(p + u * kLanes);
  return y;
}
template <typename T>
VV_INLINE void store_group(T* p, const Group& y) {
  for (int u = 0; u < kParts; ++u) store_row(p + u * kLanes, y.v[u]);
}

// body(load, store) for every group of a head: whole ones, then what is left. load(p, pad) reads elements of p and
// fills up with `pad`.
template <typename Body>
VV_INLINE void each_group(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kGroup <= width; i += kGroup) {
    body([i](const auto* p, float = 0.0f) { return load_group(p + i); },
         [i](auto* p, const Group& y) { store_group(p + i, y); });
  }
  if (i == width) return;
  const int64_t count = width - i;
  const auto load_rest = [=](const auto* p, float pad = 0.0f) {
    float rest[kGroup];
    for (int l = 0; l < kGroup; ++l) rest[l] = pad;
    each_vector(count, [&](auto load_at, auto store_at) { store_at(rest, load_at(p + i)); });
    return load_group(rest);
  };
  const auto store_rest = [=](auto* p, const Group& y) {
    float rest[kGroup];
    store_group(rest, y);
    each_vector(count, [&](auto load_at, auto store_at) { store_at(p + i, load_at(rest)); });
  };
  body(load_rest, store_rest);
}

// y = ((x - mean) - rest) * gain; not centred: x * gain.
struct HeadNorm {
  float mean, rest, gain;
};

// Of `heads` heads that begin at x, taken together.
template <bool kCentred, typename T>
VV_INLINE HeadNorm head_norm(const T* x, int64_t heads, int64_t stride, int64_t width, double eps) {
  const double part = 1.0 / static_cast<double>(heads * width);
  const auto total = [&](float pad, const auto& term) __attribute__((always_inline)) {
    Group lanes = all(0.0f);
    for (int64_t h = 0; h < heads; ++h) {
      each_group(width, [&](auto load_at, auto)
                            __attribute__((always_inline)) { lanes = lanes + term(load_at(x + h * stride, pad)); });
    }
    return sum(lanes);
  };
  if (!kCentred) {
    const float squares = total(0.0f, [](const Group& v) { return v * v; });
    return {0.0f, 0.0f, static_cast<float>(1.0 / __builtin_sqrt(squares * part + eps))};
  }
  const float mean = static_cast<float>(total(0.0f, [](const Group& v) { return v; }) * part);
  const Group middle = all(mean);
  Group differences = all(0.0f);
  const float squares = total(mean, [&](const Group& v) {
    const Group d = v - middle;
    differences = differences + d;
    return d * d;
  });
  const double rest = sum(differences) * part, variance = squares * part - rest * rest;
  const double positive = variance < 0.0 ? 0.0 : variance;  // a constant head; NaN stays
  return {mean, static_cast<float>(rest), static_cast<float>(1.0 / __builtin_sqrt(positive + eps))};
}

// norm[k] of `count` norms, each of `heads` heads.
template <bool kCentred, typename T>
static void head_norms(const T* x, int64_t count, int64_t heads, int64_t stride, int64_t width, double eps,
                       HeadNorm* norm) {
  for (int64_t k = 0; k < count; ++k) norm[k] = head_norm<kCentred>(x + k * heads * stride, heads, stride, width, eps);
}

// (y0, y1) -> (-y1, y0) for neighbours.
VV_INLINE Group turned(Group y) {
  alignas(64) static const uint32_t kSigns[kGroup] = {1u << 31, 0, 1u << 31, 0, 1u << 31, 0, 1u << 31, 0,
                                                      1u << 31, 0, 1u << 31, 0, 1u << 31, 0, 1u << 31, 0};
  swap_pairs16(y.v);
  for (int u = 0; u < kParts; ++u) {
    const U sign = bits(load(reinterpret_cast<const float*>(kSigns) + u * kLanes));
    y.v[u] = from_bits(bits(y.v[u]) ^ sign);
  }
  return y;
}

enum class Turn { kNone, kNeighbours, kHalves };

struct HeadRow {
  const float *weight, *bias, *cos, *sin;  // weight and bias may be null
};

// From one head to the next, in elements.
struct HeadStrides {
  int64_t x, out, vector, norm;
};

template <bool kCentred, Turn kTurn, typename T>
VV_INLINE void head_row(const T* x, T* out, const HeadRow& row, const HeadNorm& norm, int64_t width) {
  const Group mean = all(norm.mean), rest = all(norm.rest), gain = all(norm.gain);
  const auto normal = [&](auto load_at, int64_t from) __attribute__((always_inline)) {
    Group y = load_at(x + from);
    if (kCentred) y = (y - mean) - rest;
    y = y * gain;
    if (row.weight != nullptr) y = y * load_at(row.weight + from);
    return row.bias == nullptr ? y : y + load_at(row.bias + from);
  };
  const int64_t half = width / 2;
  each_group(kTurn == Turn::kHalves ? half : width, [&](auto load_at, auto store_at) __attribute__((always_inline)) {
    const Group y = normal(load_at, 0);
    if (kTurn == Turn::kNone) {
      store_at(out, y);
    } else if (kTurn == Turn::kNeighbours) {
      store_at(out, y * load_at(row.cos) + turned(y) * load_at(row.sin));
    } else {
      const Group z = normal(load_at, half);
      const Group first = y * load_at(row.cos) - z * load_at(row.sin);
      const Group second = z * load_at(row.cos + half) + y * load_at(row.sin + half);
      store_at(out, first);
      store_at(out + half, second);
    }
  });
}

// `count` heads; vectors and norms move on by their steps from head to head.
template <bool kCentred, Turn kTurn, typename T>
static void head_rows(const T* x, T* out, const HeadStrides& step, HeadRow row, const HeadNorm* norm, int64_t count,
                      int64_t width) {
  for (int64_t h = 0; h < count; ++h) {
    head_row<kCentred, kTurn>(x + h * step.x, out + h * step.out, row, norm[h * step.norm], width);
    if (row.weight != nullptr) row.weight += step.vector;
    if (row.bias != nullptr) row.bias += step.vector;
  }
}

template <bool kCentred, typename T>
VV_INLINE void token_row(const QkNormRopeArgs& args, const QkSide& side, const QkVectors& vectors, int64_t sample,
                         int64_t token) {
  const int64_t width = args.width, r = token - args.first_row;
  const T* x = static_cast<const T*>(side.x.data) + sample * side.x.sample_stride + token * side.x.token_stride;
  T* out = static_cast<T*>(side.out.data) + sample * side.out.sample_stride + token * side.out.token_stride;
  const bool here = side.turned && r >= 0 && r < args.rows, across = vectors.across;
  const HeadStrides step = {side.x.head_stride, side.out.head_stride, across ? width : 0, across ? 0 : 1};
  HeadRow row = {vectors.weight, vectors.bias, nullptr, nullptr};
  if (here) {
    row.cos = args.cos.data + sample * args.cos.sample_stride + r * args.cos.row_stride;
    row.sin = args.sin.data + sample * args.sin.sample_stride + r * args.sin.row_stride;
  }
  const auto rows = !here         ? &head_rows<kCentred, Turn::kNone, T>
                    : args.halves ? &head_rows<kCentred, Turn::kHalves, T>
                                  : &head_rows<kCentred, Turn::kNeighbours, T>;
  HeadNorm norm[kHeads];
  for (HeadNorm& one : norm) one = {0.0f, 0.0f, 1.0f};
  const bool normed = args.kind != HeadNormKind::kNone;
  if (normed && across) head_norms<kCentred>(x, 1, side.heads, step.x, width, args.eps, norm);
  for (int64_t h = 0; h < side.heads; h += kHeads) {
    const int64_t count = side.heads - h < kHeads ? side.heads - h : kHeads;
    if (normed && !across) head_norms<kCentred>(x + h * step.x, count, 1, step.x, width, args.eps, norm);
    HeadRow from = row;
    if (row.weight != nullptr) from.weight += h * step.vector;
    if (row.bias != nullptr) from.bias += h * step.vector;
    rows(x + h * step.x, out + h * step.out, step, from, norm, count, width);
  }
}

template <typename T>
static void tokens_of(const QkNormRopeArgs& args, const QkSide& side, const QkVectors& vectors, int64_t sample,
                      int64_t begin, int64_t end) {
  const bool centred = args.kind == HeadNormKind::kLayer;
  for (int64_t token = begin; token < end; ++token) {
    centred ? token_row<true, T>(args, side, vectors, sample, token)
            : token_row<false, T>(args, side, vectors, sample, token);
  }
}

static void qk_norm_rope_tokens(const QkNormRopeArgs& args, const QkSide& side, const QkVectors& vectors,
                                int64_t sample, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat32 ? tokens_of<float>(args, side, vectors, sample, begin, end)
                                : tokens_of<uint16_t>(args, side, vectors, sample, begin, end);
}

}  // namespace vivace::VV_NAMESPACE
