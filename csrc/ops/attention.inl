// softmax(scale q k^T) v of a block of queries of one head.
//
// Keys are packed as words in columns, [words][keys], values as [keys][columns], both in panels of up to 64 columns for
// the micro-kernels of gemm.inl. A word is a float, or a pair of bfloat16 that are multiplied together: neighbours in a
// query or key, keys i and i + 16 of 32 in weights and values, which is where rounding two vectors of scores puts them.
// Long sequences go by blocks of keys: sums and their weights so far are scaled to the largest score known by then.
//
// A row's bits: products summed as in gemm.inl, over the keys of a block, block after block; the sum of weights in lane
// j mod 32 for key j, then by a tree. Weights are 2^(score * scale * log2(e) - largest), exactly 0 from 2^-127 down, so
// that scores of -infinity, as columns without a key get, add nothing.
//
// Floor: the flops of both products. One Zen 5 core, 256 keys, heads of 64, float32 | bfloat16: the softmax takes 11 |
// 26 % of the time, packing as much as 12 queries. Tried, GFLOP/s: strips of 12 rows 153 | 269, 24: 160 | 272, 48: 164
// | 288, 96: 157 | 272.

namespace vivace::VV_NAMESPACE {

constexpr float kLeast = -0x1.fffffep+127f;  // of floats
constexpr float kLog2E = 0x1.715476p+0f;
constexpr int kSpan = 32;  // keys that go through the softmax together
constexpr int kSpanVectors = kSpan / kLanes;

// Columns in panels of up to 64, as even as multiples of 16 can be.
struct Panels {
  explicit Panels(int64_t columns) : vectors((columns + 15) / 16), count((vectors + 3) / 4) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count * 16; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t vectors, count;
};

// Rows of elements, a stride apart.
template <typename T>
struct HeadRows {
  const T* at(int64_t row) const { return data + row * stride; }
  const T* data;
  int64_t stride;
};

template <typename T>
VV_INLINE HeadRows<T> rows_of(const HeadTensor& tensor, int64_t sample, int64_t head, int64_t first) {
  const T* data = static_cast<const T*>(tensor.data) + sample * tensor.sample_stride + head * tensor.head_stride;
  return {data + first * tensor.token_stride, tensor.token_stride};
}

// The same of keys or values, whose samples may lie anywhere: at[sample] is where one begins.
template <typename T>
VV_INLINE HeadRows<T> rows_of(const HeadTensor& tensor, const void* const* at, int64_t sample, int64_t head,
                              int64_t first) {
  if (at == nullptr) return rows_of<T>(tensor, sample, head, first);
  const T* data = static_cast<const T*>(at[sample]) + head * tensor.head_stride;
  return {data + first * tensor.token_stride, tensor.token_stride};
}

// whole(i) for vectors that cover [begin, end), the last one moved back to end there; where there is less than one
// vector, part(i) for every element.
template <typename Whole, typename Part>
VV_INLINE void cover(int64_t begin, int64_t end, const Whole& whole, const Part& part) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) whole(i);
  if (i == end) return;
  if (end - begin >= kLanes) return whole(end - kLanes);
  for (; i < end; ++i) part(i);
}

VV_INLINE F words_at(const float* row) { return load(row); }
VV_INLINE F words_at(const uint16_t* row) { return from_bits(load_words(row)); }

// Word k of a row of `width` elements, filled up with 0.
template <typename T>
VV_INLINE float word_of(const T* row, int64_t k, int64_t width) {
  T parts[kPair<T>] = {};
  for (int64_t i = k * kPair<T>; i < width && i < (k + 1) * kPair<T>; ++i) parts[i - k * kPair<T>] = row[i];
  float word;
  memcpy(&word, parts, sizeof word);
  return word;
}

// Keys [0, count) as panels [words][keys]; columns without a key repeat the last one.
template <typename T>
static void pack_keys(const HeadRows<T>& keys, int64_t count, int64_t width, int64_t words, float* to) {
  const Panels panels(count);
  const int64_t whole_words = width / kPair<T>;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t wide = panels.width(p);
    float* panel = to + panels.begin(p) * words;
    for (int64_t j = 0; j < wide; j += kLanes) {
      const T* rows[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int64_t key = panels.begin(p) + j + l;
        rows[l] = keys.at(key < count ? key : count - 1);
      }
      const auto block = [&](int64_t k) {
        F square[kLanes];
        for (int l = 0; l < kLanes; ++l) square[l] = words_at(rows[l] + k * kPair<T>);
        transpose(square);
        for (int l = 0; l < kLanes; ++l) store(panel + (k + l) * wide + j, square[l]);
      };
      const auto single = [&](int64_t k) {
        for (int l = 0; l < kLanes; ++l) panel[k * wide + j + l] = word_of(rows[l], k, width);
      };
      cover(0, whole_words, block, single);
      if (whole_words < words) single(whole_words);
    }
  }
}

// Steps the second product takes over `count` keys.
VV_INLINE int64_t steps_of(const float*, int64_t count) { return count; }
VV_INLINE int64_t steps_of(const uint16_t*, int64_t count) {
  const int64_t rest = count % 32;
  return count / 32 * 16 + (rest < 16 ? rest : 16);
}

// Elements of the values that make one step, as words.
VV_INLINE F value_words(const HeadRows<float>& values, int64_t step, int64_t, int64_t i) {
  return load(values.at(step) + i);
}
VV_INLINE F value_words(const HeadRows<uint16_t>& values, int64_t step, int64_t count, int64_t i) {
  const int64_t key = step / 16 * 32 + step % 16;
  const U low = shift_right<16>(bits(load_bf16(values.at(key) + i)));
  return key + 16 < count ? from_bits(low ^ bits(load_bf16(values.at(key + 16) + i))) : from_bits(low);
}
VV_INLINE float value_word(const HeadRows<float>& values, int64_t step, int64_t, int64_t i) {
  return values.at(step)[i];
}
VV_INLINE float value_word(const HeadRows<uint16_t>& values, int64_t step, int64_t count, int64_t i) {
  const int64_t key = step / 16 * 32 + step % 16;
  const uint16_t pair[2] = {values.at(key)[i], key + 16 < count ? values.at(key + 16)[i] : uint16_t{0}};
  float word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// Values of keys [0, count) as panels [steps][columns], 0 beyond the width.
template <typename T>
static void pack_values(const HeadRows<T>& values, int64_t count, int64_t width, float* to) {
  const Panels panels(width);
  const int64_t steps = steps_of(values.data, count);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t begin = panels.begin(p), wide = panels.width(p);
    const int64_t end = begin + wide < width ? begin + wide : width;
    float* row = to + begin * steps;
    for (int64_t step = 0; step < steps; ++step, row += wide) {
      for (int64_t i = wide - 16; i < wide; i += kLanes) store(row + i, set1(0.0f));
      cover(
          begin, end, [&](int64_t i) { store(row + i - begin, value_words(values, step, count, i)); },
          [&](int64_t i) { row[i - begin] = value_word(values, step, count, i); });
    }
  }
}

// c = a b, or c + a b: `rows` rows of a and c, b in panels of `columns` columns, `depth` elements deep.
template <typename T>
static void multiply_panels(const T* a, int64_t a_stride, const float* b, int64_t depth, int64_t columns, int64_t rows,
                            float* c, int64_t c_stride, bool add) {
  const Panels panels(columns);
  const int64_t words = (depth + kPair<T> - 1) / kPair<T>;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t begin = panels.begin(p), wide = panels.width(p);
    const T* panel = reinterpret_cast<const T*>(b + begin * words);
    multiply<T>({a, a_stride, panel, wide, depth, c + begin, c_stride, add}, rows, static_cast<int>(wide / kUnit));
  }
}

// y = 2^t for t <= 0; exactly 0 from -127 down.
template <int N, typename T>
VV_INLINE void weights_of(const F t[N], F y[N]) {
  const F magic = set1(0x1.8p+23f);
  F shifted[N], r[N];
  for (int u = 0; u < N; ++u) {
    const F near = max(set1(-127.0f), t[u]);
    shifted[u] = near + magic;
    r[u] = near - (shifted[u] - magic);
  }
  horner<N>(GeluTerms<T>::kExp2, r, y);
  for (int u = 0; u < N; ++u) y[u] = y[u] * from_bits(shift_left<23>(bits(shifted[u]) + set1u(127)));
}

VV_INLINE void store_weights(float* to, const F y[kSpanVectors]) {
  for (int u = 0; u < kSpanVectors; ++u) store(to + u * kLanes, y[u]);
}
VV_INLINE void store_weights(uint16_t* to, const F y[kSpanVectors]) {
  for (int u = 0; u < kSpanVectors / 2; ++u) store_pairs_bf16(to + u * 2 * kLanes, y[u], y[u + kSpanVectors / 2]);
}

// Of the scores of one query so far.
struct SoftmaxState {
  float largest, sum;  // score times scale, sum of weights relative to it
};

// Scores -> weights relative to the largest score so far, in place. Returns what earlier weights are to be scaled by.
template <typename T>
static float softmax_row(float* scores, int64_t count, float scale, SoftmaxState& state) {
  F top[kSpanVectors], y[kSpanVectors], sum[kSpanVectors];
  for (int u = 0; u < kSpanVectors; ++u) top[u] = set1(kLeast), sum[u] = set1(0.0f);
  for (int64_t j = 0; j < count; j += kSpan) {
    for (int u = 0; u < kSpanVectors; ++u) top[u] = max(top[u], load(scores + j + u * kLanes));
  }
  for (int u = 1; u < kSpanVectors; ++u) top[0] = max(top[0], top[u]);
  const float here = max_lanes(top[0]) * scale;
  float factor = 1.0f;
  if (here > state.largest) {
    const F t[1] = {set1(state.largest - here)};
    weights_of<1, float>(t, y);
    float lanes[kLanes];
    store(lanes, y[0]);
    factor = lanes[0];
    state.largest = here;
  }
  const F by = set1(scale), largest = set1(state.largest);
  for (int64_t j = 0; j < count; j += kSpan) {
    for (int u = 0; u < kSpanVectors; ++u) y[u] = load(scores + j + u * kLanes) * by - largest;
    weights_of<kSpanVectors, T>(y, y);
    for (int u = 0; u < kSpanVectors; ++u) sum[u] = sum[u] + y[u];
    store_weights(reinterpret_cast<T*>(scores) + j, y);
  }
  for (int half = kSpanVectors / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) sum[u] = sum[u] + sum[u + half];
  }
  state.sum = state.sum * factor + sum_lanes(sum[0]);
  return factor;
}

VV_INLINE void scale_row(float* row, int64_t columns, float by) {
  for (int64_t i = 0; i < columns; i += kLanes) store(row + i, load(row + i) * set1(by));
}

VV_INLINE void store_element(float* to, float x) { *to = x; }
VV_INLINE void store_element(uint16_t* to, float x) { store_part(to, 1, set1(x)); }

template <typename T>
VV_INLINE void store_result(T* to, const float* sums, int64_t width, float by) {
  cover(
      0, width, [&](int64_t i) { store_row(to + i, load(sums + i) * set1(by)); },
      [&](int64_t i) { store_element(to + i, sums[i] * by); });
}

// Queries [begin, end) of one head, against the keys that are packed in the scratch.
template <typename T>
struct AttentionTask {
  const AttentionArgs& args;
  const AttentionBlocks& b;
  int64_t sample, head, begin, end;
  float* scratch;

  SoftmaxState* states() const { return reinterpret_cast<SoftmaxState*>(scratch + b.state_at); }
  float* sums(int64_t strip) const { return scratch + b.sum_at + (b.keys < args.keys ? strip - begin : 0) * b.columns; }

  // Rows [strip, strip + rows) and keys [first, first + count).
  void add_strip(int64_t strip, int64_t rows, int64_t first, int64_t count) const {
    const auto query = rows_of<T>(args.query, sample, head, strip);
    float* scores = scratch + b.score_at;
    multiply_panels(query.data, query.stride, scratch + b.key_at, args.width, count, rows, scores, b.padded, false);
    const int64_t columns = (count + kSpan - 1) / kSpan * kSpan;
    SoftmaxState* state = states() + (strip - begin);
    float* to = sums(strip);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * b.padded;
      for (int64_t j = count; j < columns; ++j) row[j] = -__builtin_inff();
      const float factor = softmax_row<T>(row, columns, args.scale * kLog2E, state[r]);
      if (first > 0 && factor != 1.0f) scale_row(to + r * b.columns, b.columns, factor);
    }
    const auto* weights = reinterpret_cast<const T*>(scores);
    const int64_t depth = steps_of(weights, count) * kPair<T>;
    multiply_panels(weights, b.padded * kPair<T>, scratch + b.value_at, depth, args.width, rows, to, b.columns,
                    first > 0);
  }

  void store_strip(int64_t strip, int64_t rows) const {
    const auto to = rows_of<T>(args.out, sample, head, strip);
    const SoftmaxState* state = states() + (strip - begin);
    for (int64_t r = 0; r < rows; ++r) {
      T* row = const_cast<T*>(to.at(r));
      store_result(row, sums(strip) + r * b.columns, args.width, 1.0f / state[r].sum);
    }
  }

  // Without keys: the sum of nothing.
  void clear() const {
    const auto to = rows_of<T>(args.out, sample, head, begin);
    for (int64_t r = 0; r < end - begin; ++r) {
      memset(const_cast<T*>(to.at(r)), 0, static_cast<size_t>(args.width) * sizeof(T));
    }
  }

  void run() const {
    if (args.keys == 0) return clear();
    for (int64_t q = 0; q < end - begin; ++q) states()[q] = {kLeast, 0.0f};
    for (int64_t first = 0; first < args.keys; first += b.keys) {
      const int64_t count = args.keys - first < b.keys ? args.keys - first : b.keys;
      pack_keys(rows_of<T>(args.key, args.key_at, sample, head, first), count, args.width, b.words, scratch + b.key_at);
      pack_values(rows_of<T>(args.value, args.value_at, sample, head, first), count, args.width, scratch + b.value_at);
      for (int64_t strip = begin; strip < end; strip += b.strip) {
        const int64_t rows = end - strip < b.strip ? end - strip : b.strip;
        add_strip(strip, rows, first, count);
        if (first + count == args.keys) store_strip(strip, rows);
      }
    }
  }
};

static void attention_rows(const AttentionArgs& args, const AttentionBlocks& blocks, int64_t sample, int64_t head,
                           int64_t begin, int64_t end, float* scratch) {
  if (args.dtype == Dtype::kFloat32) {
    AttentionTask<float>{args, blocks, sample, head, begin, end, scratch}.run();
  } else {
    AttentionTask<uint16_t>{args, blocks, sample, head, begin, end, scratch}.run();
  }
}

}  // namespace vivace::VV_NAMESPACE
