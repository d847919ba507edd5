// How blocks of different clusters wait for each other: by counters in global memory.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace attanchor {

// Finished match items of a sample, and how many of its readers have left.
ATTANCHOR_DEVICE unsigned* matched(const Problem& p, int sample) { return p.state.counters + sample * COUNTER_STRIDE; }
ATTANCHOR_DEVICE unsigned* left(const Problem& p, int sample) { return matched(p, sample) + 1; }

// Says that the block is done with something. By one thread, behind a barrier of the block.
ATTANCHOR_DEVICE void say_done(unsigned* counter) {
  arch::fence();
  arch::count(counter, 1);
}

// The same, and finds out whether that is the last of `all`: `*before` becomes how many were done, to be read behind a
// barrier of the block. The last knows of everything that was done before.
ATTANCHOR_DEVICE void ask_last(unsigned* counter, unsigned count, unsigned all, unsigned* before) {
  arch::fence();
  const unsigned done = arch::add(counter, count);
  if (done == all - count) arch::fence();
  *before = done;
}

// By the block, for one thing of `all`.
ATTANCHOR_DEVICE bool is_last(unsigned* counter, unsigned all, unsigned* before) {
  arch::sync_block();
  if (arch::thread() == 0) ask_last(counter, 1, all, before);
  arch::sync_block();
  return *before == all - 1;
}

}  // namespace attanchor
