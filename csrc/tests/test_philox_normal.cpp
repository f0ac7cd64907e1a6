// Noise against the definition, element by element.
#include <algorithm>

#include "ops/philox_normal.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

VV_TEST(the_definition_here_is_the_published_generator) {
  uint32_t counter[4] = {0, 0, 0, 0};
  philox(counter, 0, 0);
  const uint32_t known[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  CHECK(std::equal(counter, counter + 4, known));
}

VV_TEST(normals_have_the_bits_of_the_definition) {
  Random random(1);
  for (const int64_t numel : {1, 2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 127, 1025, 4097}) {
    for (int64_t offset = 0; offset < 4; ++offset) {
      const int64_t batch = 1 + random.below(3), draw = random.chance(20) ? UINT32_MAX : random.word();
      std::vector<int64_t> seeds, pictures;
      for (int64_t b = 0; b < batch; ++b) {
        seeds.push_back(static_cast<int64_t>(uint64_t{random.word()} << 32 | random.word()));
        pictures.push_back(random.word());
      }
      Buffer<float> out(batch * numel, offset);
      philox_normal(out.data(), batch, numel, seeds.data(), pictures.data(), draw, 1 + offset % 2);
      bool right = true;
      for (int64_t i = 0; i < batch * numel; ++i) {
        const int64_t b = i / numel;
        const float want = normal(static_cast<uint64_t>(seeds[b]), static_cast<uint32_t>(pictures[b]),
                                  static_cast<uint32_t>(draw), i % numel);
        right = right && bits(out.data()[i]) == bits(want) && std::isfinite(want);
      }
      CHECK_IN(right, std::to_string(numel));
    }
  }
}

VV_TEST(many_normals_are_the_same_on_one_thread_and_two) {
  const int64_t numel = 3 * 32768 + 5, seeds[] = {7, -7}, pictures[] = {0, 1};
  Buffer<float> one(2 * numel, 1), two(2 * numel, 0);
  philox_normal(one.data(), 2, numel, seeds, pictures, 3, 1);
  philox_normal(two.data(), 2, numel, seeds, pictures, 3, 2);
  CHECK(std::equal(one.data(), one.data() + 2 * numel, two.data()));
  bool right = true;
  for (int64_t i = 0; i < numel; i += 997)
    right = right && bits(two.data()[numel + i]) == bits(normal(uint64_t(-7), 1, 3, i));
  CHECK(right);
}

VV_TEST(bad_noise_arguments_are_refused) {
  float out[4] = {5.0f, 5.0f, 5.0f, 5.0f};
  const int64_t zero[] = {0, 0, 0, 0};
  const auto refuses = [&](float* to, int64_t batch, int64_t numel, int64_t draw) {
    return !refusal([&] { philox_normal(to, batch, numel, zero, zero, draw, 1); }).empty();
  };
  CHECK(refuses(out, -1, 4, 0) && refuses(out, 1, -4, 0) && refuses(out, INT64_MIN, 1, 0));
  CHECK(refuses(out, 1, 4, -1) && refuses(out, 1, 4, int64_t{1} << 32));
  CHECK(refuses(out, int64_t{1} << 40, int64_t{1} << 40, 0) && refuses(out, 1, kMaxNoiseElements + 1, 0));
  CHECK(refuses(nullptr, 1, 4, 0) && !refuses(nullptr, 0, 4, 0) && !refuses(nullptr, 4, 0, 0));
  CHECK(out[0] == 5.0f && out[3] == 5.0f);
}

}  // namespace
}  // namespace vivace::test
