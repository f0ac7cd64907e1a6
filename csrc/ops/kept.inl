// Rows of what is kept, read and written as vectors of float32.

namespace vivace::VV_NAMESPACE {

struct Half {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

constexpr uint32_t kBias8 = 120u << 23;  // between the exponents of float32 and e4m3

VV_INLINE F load_row(const Half* p) { return load_f16(&p->bits); }
VV_INLINE void store_row(Half* p, F a) { store_f16(&p->bits, a); }

// All ones in lanes where a < b, both below 2^31.
VV_INLINE U below(U a, U b) { return shift_right_signed<31>(a - b); }

// An exponent of 0 is one of 1 without the leading one, which is taken off again.
VV_INLINE F load_row(const Float8* p) {
  const U byte = load_bytes(&p->bits), body = byte & set1u(0x7fu);
  const U tiny = below(body, set1u(8u)), nan = below(set1u(0x7eu), body);
  const U one = set1u(0x3c800000u) & tiny;  // 2^-6
  const U whole = shift_left<20>(body + (set1u(8u) & tiny)) + set1u(kBias8);
  const U size = bits(from_bits(whole) - from_bits(one));
  return from_bits(max(size, nan & set1u(0x7fc00000u)) ^ (shift_left<24>(byte) & set1u(0x80000000u)));
}

// |a|, 448 at most, plus 2^20 times its power of two, that of 2^-6 at least, keeps the places that e4m3 has. The code
// of NaN follows that of 448.
VV_INLINE void store_row(Float8* p, F a) {
  const U x = bits(a), body = x & set1u(0x7fffffffu), nan = below(set1u(0x7f800000u), body);
  const U size = min(body, set1u(0x43e00000u));
  const U power = max(size & set1u(0x7f800000u), set1u(0x3c800000u));
  const U large = power + set1u(20u << 23);
  const F sum = from_bits(size) + from_bits(large);
  const U code = bits(sum) - large + shift_right<20>(power - set1u(0x3c800000u)) - nan;
  store_bytes(reinterpret_cast<int8_t*>(&p->bits), code ^ (shift_right<24>(x) & set1u(0x80u)));
}

// How many tokens are kept, and which of them a token of a call is.
VV_INLINE int64_t kept_tokens(const KeptRows& kept, int64_t tokens) {
  return kept.some.ids == nullptr ? tokens : kept.some.tokens;
}
VV_INLINE int64_t kept_token(const KeptRows& kept, int64_t tokens, int64_t sample, int64_t token) {
  return kept.some.ids == nullptr ? token : kept.some.ids[sample % kept.some.samples * tokens + token];
}

// use(plane) of what a row keeps, `offset` elements on, as a pointer to elements of the store.
template <typename Use>
VV_INLINE void with_kept(const KeptRows& kept, int64_t sample, int64_t offset, const Use& use) {
  void* values = kept.rows[sample].values;
  switch (kept.dtype) {
    case Dtype::kFloat32:
      return use(static_cast<float*>(values) + offset);
    case Dtype::kBfloat16:
      return use(static_cast<uint16_t*>(values) + offset);
    case Dtype::kFloat16:
      return use(static_cast<Half*>(values) + offset);
    case Dtype::kFloat8:
      return use(static_cast<Float8*>(values) + offset);
    default:
      return use(static_cast<int8_t*>(values) + offset);
  }
}

// out = hidden + gate * f, or hidden + f; f(load) makes a vector at the place of `load`.
template <typename T, typename Make>
VV_INLINE void add_made(const T* hidden, const float* gate, T* out, int64_t width, const Make& f) {
  if (gate == nullptr) {
    each_vector(width, [&](auto load_at, auto store_at) { store_at(out, load_at(hidden) + f(load_at)); });
  } else {
    each_vector(width,
                [&](auto load_at, auto store_at) { store_at(out, load_at(hidden) + load_at(gate) * f(load_at)); });
  }
}

}  // namespace vivace::VV_NAMESPACE
