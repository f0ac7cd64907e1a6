#include "ops/kept.h"

#include "core/error.h"

namespace vivace {

void check_kept(const char* op, const KeptRows& kept, int64_t batch) {
  if (kept.dtype < Dtype::kFloat32 || kept.dtype > Dtype::kFloat8) fail(op, ": nothing is kept in this dtype");
  if (kept.rows == nullptr) fail(op, ": kept has no memory");
  for (int64_t r = 0; r < batch; ++r) {
    if (kept.rows[r].values == nullptr) fail(op, ": kept row ", r, " has no memory");
    if (kept.dtype == Dtype::kInt8 && kept.rows[r].scales == nullptr) fail(op, ": int8 row ", r, " has no scales");
  }
}

void check_ids(const char* op, const TokenIds& some, int64_t batch, int64_t count) {
  if (some.ids == nullptr) return;
  if (some.samples < 1 || batch % some.samples != 0)
    fail(op, ": ids of ", some.samples, " samples for ", batch, " rows");
  for (int64_t i = 0; i < some.samples * count; ++i) {
    if (some.ids[i] < 0 || some.ids[i] >= some.tokens)
      fail(op, ": id ", some.ids[i], " is not one of ", some.tokens, " tokens");
  }
}

void check_hidden(const char* op, const RowTensor& hidden, const RowTensor& gate, const RowTensor& out) {
  if (hidden.data == nullptr) return;
  check_rows(op, "hidden", hidden, hidden.dtype, false);
  check_rows(op, "out", out, hidden.dtype, false);
  check_rows(op, "gate", gate, hidden.dtype, true);
}

}  // namespace vivace
