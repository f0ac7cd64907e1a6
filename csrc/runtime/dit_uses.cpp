#include "runtime/dit_uses.h"

#include "core/error.h"

namespace vivace {
namespace {

// A use by itself.
void check_use(const DitUse& use, int64_t number, int64_t last, int64_t rows) {
  const bool half = use.cell == DitCell::kHalf, applies = use.action == DitAction::kApply;
  const int64_t most = !applies ? use.at : half ? use.at + 1 : last;
  if (use.until < use.at + applies || use.until > most || use.until > last)
    fail("Dit: use ", number, " is of halves ", use.at, " to ", use.until, " of ", last);
  if (use.action == DitAction::kOpen) {
    if (use.cell != DitCell::kResidual) fail("Dit: use ", number, " opens a range that keeps no difference");
    return;
  }
  if ((use.cell == DitCell::kHeads) != (use.action == DitAction::kKeys))
    fail("Dit: use ", number, " keeps keys and values otherwise than of an attention");
  check_kept("Dit", use.kept, rows);
  if (use.made < 0) fail("Dit: use ", number, " makes ", use.made, " differences");
  if (applies && (use.terms < 1 || use.weights == nullptr)) fail("Dit: use ", number, " has no weights");
}

}  // namespace

void check_uses(const DitUse* uses, int64_t count, int64_t first, int64_t last, int64_t rows, bool some) {
  for (int64_t i = 0; i < count; ++i) check_use(uses[i], i, last, rows);
  DitUses walk(uses, count);
  bool open = false;
  int64_t done = first, ran = -1;  // the last half that ran
  for (;;) {
    const int64_t begin = walk.next(), half = walk.past(done);
    for (int64_t i = begin; i < walk.next(); ++i) {
      const auto& [action, cell, at, until, made, terms, kept, weights] = uses[i];
      const bool opens = action == DitAction::kOpen, keeps = action == DitAction::kKeep;
      if (keeps && cell == DitCell::kHalf && (ran != at - 1 || i > begin))
        fail("Dit: use ", i, " keeps half ", at - 1, ", which is not what came before it");
      if ((opens && open) || (keeps && cell == DitCell::kResidual && !open))
        fail("Dit: use ", i, opens ? " opens a range inside another" : " keeps a range that was not opened");
      if (action == DitAction::kKeys && (at != half || half % 2 == 1))
        fail("Dit: use ", i, " keeps keys and values of half ", at, ", which is no attention that runs");
      open = opens || (open && !(keeps && cell == DitCell::kResidual));
    }
    if (half >= last) break;
    if (some && half % 2 == 0 && walk.keys(half) == nullptr)
      fail("Dit: block ", half / 2, " of a row of some tokens has no kept keys and values");
    ran = half, done = half + 1;
  }
  if (walk.next() < count) fail("Dit: use ", walk.next(), " of halves from ", uses[walk.next()].at, " is out of order");
}

}  // namespace vivace
