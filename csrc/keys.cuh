// One 64-bit word per mover: best cosine above, host below, made so that the unsigned maximum is the answer.
//
// `orderable float bits << 32 | ~host`: the larger cosine wins, of equal ones the lower host; 0 = no candidate yet. The
// order of arrival does not matter, so an atomic maximum merges the tiles repeatably.
#pragma once

#include "counters.cuh"

namespace attanchor {

constexpr float NO_SCORE = -__builtin_huge_valf();

// Of a finite score and an index >= 0.
ATTANCHOR_DEVICE word64 encode_key(float score, int index) {
  const uint32_t bits = arch::float_bits(score + 0.0f);  // -0.0 + 0.0 is 0.0: equal scores must have equal bits
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<word64>(ordered) << 32 | static_cast<uint32_t>(~index);
}

ATTANCHOR_DEVICE float key_score(word64 key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  return key == 0 ? NO_SCORE : arch::bits_float(bits);
}

// Meaningless for an empty key.
ATTANCHOR_DEVICE int key_index(word64 key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// The threshold; one that no cosine reaches stands for 1 and more, and for NaN.
ATTANCHOR_DEVICE float threshold(const Problem& p) {
  constexpr float LEAST = -2, NEVER = 2;  // cosines lie between; an empty key's score does not reach either
  if (p.tau_on_device == nullptr) return p.tau;
  const float tau = *p.tau_on_device;
  return !(tau < 1) ? NEVER : tau > LEAST ? tau : LEAST;
}

// Orders the movers for the budget: larger score first, of equal ones the lower mover; 0 = not eligible.
ATTANCHOR_DEVICE word64 rank_key(word64 key, int mover, float tau) {
  if (!(key_score(key) >= tau)) return 0;
  return (key >> 32 << 32) | static_cast<uint32_t>(~mover);
}

// Up to so many movers are ranked against each other by everyone who needs to know; above, one block finds the cut.
constexpr int RANKED_MOVERS = THREADS;

// Whether the last match item of a sample publishes the cut; then `matched` counts one more.
ATTANCHOR_DEVICE bool publishes_cut(const Problem& p, int movers) { return p.budgeted && movers > RANKED_MOVERS; }

// Rank key of the last mover within the budget (>= 1), 0 if all are within it. At most RANKED_MOVERS movers; `key` is
// that of mover thread(). `shared` holds RANKED_MOVERS + 1 words.
ATTANCHOR_DEVICE word64 cut_by_ranking(word64 key, int movers, int budget, float tau, word64* shared) {
  const int mover = arch::thread();
  const word64 own = mover < movers ? rank_key(key, mover, tau) : 0;
  shared[mover] = own;
  if (mover == 0) shared[RANKED_MOVERS] = 0;
  arch::sync_block();
  int rank = 0;
  for (int other = 0; other < movers; other++) rank += shared[other] > own;
  if (own != 0 && rank == budget - 1) shared[RANKED_MOVERS] = own;
  arch::sync_block();
  const word64 cut = shared[RANKED_MOVERS];
  arch::sync_block();
  return cut;
}

// The wanted-th largest of `count` keys, by radix selection: eight bits of the answer at a time; 0 if fewer keys are not
// zero. `histogram` holds 256 counters, `scratch` WARPS + 2.
template <class KeyOf>
ATTANCHOR_DEVICE word64 select_largest(int count, int wanted, const KeyOf& key_of, int* histogram, int* scratch) {
  word64 prefix = 0;  // the answer is the wanted-th largest of the keys that begin with it
  for (int shift = 56; shift >= 0; shift -= 8) {
    histogram[arch::thread()] = 0;
    arch::sync_block();
    for (int at = arch::thread(); at < count; at += THREADS) {
      const word64 own = key_of(at);
      const bool within = shift == 56 || own >> (shift + 8) == prefix >> (shift + 8);
      if (own != 0 && within) arch::add_shared(histogram + (own >> shift & 255), 1);
    }
    arch::sync_block();
    // Thread t looks at digit 255 - t: the sum before it counts the keys with a larger digit.
    const int digit = 255 - arch::thread();
    const int here = histogram[digit];
    int total;
    const int larger = block_sum_before(here, total, scratch);
    if (larger < wanted && wanted <= larger + here) {
      scratch[WARPS] = digit;
      scratch[WARPS + 1] = wanted - larger;
    }
    arch::sync_block();
    if (total < wanted) return 0;  // only the first round can say so
    prefix |= static_cast<word64>(scratch[WARPS]) << shift;
    wanted = scratch[WARPS + 1];
    arch::sync_block();
  }
  return prefix;
}

// The same as cut_by_ranking for any number of movers.
ATTANCHOR_RARE word64 cut_by_selection(const word64* keys, int movers, int budget, float tau, int* histogram,
                                       int* scratch) {
  const auto rank = [=](int mover) { return rank_key(arch::load_fresh(keys + mover), mover, tau); };
  return select_largest(movers, budget, rank, histogram, scratch);
}

}  // namespace attanchor
