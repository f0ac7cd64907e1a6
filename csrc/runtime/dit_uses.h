// What a row of a DiT does with kept values, between its halves of blocks: half 2 i is the attention of block i, half
// 2 i + 1 its MLP.
#pragma once

#include "ops/kept.h"

namespace vivace {

enum class DitAction {
  kOpen,   // remembers the hidden states: a range of blocks begins here of which the difference is kept
  kKeep,   // keeps what the half, or the range, gave that ends here
  kApply,  // kept values take the place of halves [at, until), which do not run
  kKeys,   // keeps keys and values of the attention `at`; in a row of some tokens, it reads those of all from there
};

enum class DitCell {
  kHalf,      // what half a block gives, before its gate
  kResidual,  // what a range of blocks adds to the hidden states
  kBlock,     // the hidden states that leave a range
  kHeads,     // of kKeys: keys of all heads, then their values, side by side
};

// Happens when `at` halves are done. All of it goes token by token, so what lies between two halves is one stage. Keys
// and values are kept in a stage of their own, between the linear that makes them and the attention that reads them.
struct DitUse {
  DitAction action;
  DitCell cell;
  int64_t at, until;     // kApply: until > at; else until = at
  int64_t made;          // kKeep: differences made beside the value
  int64_t terms;         // kApply: planes read
  KeptRows kept;         // [R]; kOpen: none
  const float* weights;  // kApply: [R, terms]
};

// The uses of a row in order, followed half by half:
//   for (half = past(first); half < last; half = past(half + 1)) ...
class DitUses {
 public:
  DitUses(const DitUse* uses, int64_t count) : uses_(uses), count_(count) {}

  // Goes past what happens when so many halves are done; returns the next half that runs.
  int64_t past(int64_t done) {
    for (; next_ < count_ && uses_[next_].at == done; ++next_) done = uses_[next_].until;
    return done;
  }

  // What this half gives is kept.
  bool keeps(int64_t half) const {
    return next_ < count_ && uses_[next_].at == half + 1 && uses_[next_].action == DitAction::kKeep &&
           uses_[next_].cell == DitCell::kHalf;
  }

  int64_t next() const { return next_; }  // uses gone past

  // The use of the keys of this half, the next one that runs; null: they are not kept.
  const DitUse* keys(int64_t half) const {
    for (int64_t i = next_ - 1; i >= 0 && uses_[i].at == half; --i) {
      if (uses_[i].action == DitAction::kKeys) return uses_ + i;
    }
    return nullptr;
  }

 private:
  const DitUse* uses_;
  int64_t count_, next_ = 0;
};

// Throws unless all uses happen between halves [first, last), in order, with memory for so many rows. some: the row
// computes some tokens, so that every attention needs kept keys.
void check_uses(const DitUse* uses, int64_t count, int64_t first, int64_t last, int64_t rows, bool some);

}  // namespace vivace
