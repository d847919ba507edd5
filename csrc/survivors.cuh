// Which image tokens stay where some are dropped, found by the last match item of a sample.
//
//     first    hosts of inserted anchors (text into image)
//     then     of every cell in which none stays, the token of the highest priority
//     then     all others; within each of the three the higher priority first, of equal ones the lower slot
//
// One 64-bit word a token says all that: tier << 62 | orderable priority << 30 | slots from the end. The K-th largest is
// the cut. What is published is a bit for each slot of the new sequence, and before every 32 slots how many there are.
#pragma once

#include "plan.cuh"

namespace attanchor {

enum Tier : int { OTHER = 1, BEST_OF_CELL = 2, HOST = 3 };
constexpr int TIER_AT = 62, PRIORITY_AT = 30;

struct SurvivorsShared {
  word64 rank[RANKED_MOVERS + 1];
  int histogram[THREADS];
  int scratch[WARPS + 2];
  unsigned arrived;
};

// The slots of a sample's new sequence, once its match work is done.
struct Survivors {
  const word64* words;

  ATTANCHOR_DEVICE Survivors(const Problem& p, int sample)
      : words(p.drop.survivors + static_cast<int64_t>(sample) * p.drop.words) {}

  ATTANCHOR_DEVICE bool has(int slot) const { return arch::load_fresh(words + slot / 32) >> slot % 32 & 1; }

  // How many stand before `slot`, which may be one past the last.
  ATTANCHOR_DEVICE int before(int slot) const {
    const word64 word = arch::load_fresh(words + slot / 32);
    return static_cast<int>(word >> 32) + arch::count_bits(static_cast<uint32_t>(word) & ((1u << slot % 32) - 1));
  }
};

// By a block, for a sample whose match work is done.
struct SurvivorSelection {
  const Problem& p;
  SurvivorsShared& s;
  const Plan plan;
  const int movers, feature_base;
  const int slots, images;  // images: the length of what image tokens have a value in
  word64* const priority;   // of each slot, 0: no image token that takes part
  word64* const best;       // of each cell

  ATTANCHOR_DEVICE SurvivorSelection(const Problem& problem, SurvivorsShared& shared, int sample, int of_movers, int base)
      : p(problem),
        s(shared),
        plan(problem, sample),
        movers(of_movers),
        feature_base(base),
        slots(p.rows.slots),
        images(p.rows.merges ? p.rows.slots : p.rows.images),
        priority(p.drop.priority + static_cast<int64_t>(sample) * slots),
        best(p.drop.best + static_cast<int64_t>(sample) * images) {}

  // Returns the cut of the budget.
  ATTANCHOR_DEVICE word64 run() {
    const int given = p.drop.keep_each == nullptr ? p.drop.keep : p.drop.keep_each[plan.sample];
    const int keep = given > 0 ? given : 0;
    const word64 cut = find_cut(p.image_into_text || p.budget < keep ? p.budget : keep);
    if (!p.image_into_text) mark_hosts(cut);
    const int tokens = rank_tokens();
    if (p.drop.cells != nullptr) prefer_cells();
    word64 least = 1;
    if (keep == 0) {
      least = ~word64(0);
    } else if (keep < tokens) {
      const word64* words = priority;
      least = select_largest(slots, keep, [=](int at) { return arch::load_fresh(words + at); }, s.histogram, s.scratch);
    }
    publish(least);
    return cut;
  }

 private:
  ATTANCHOR_DEVICE word64 find_cut(int budget) {
    if (budget == 0) return ~word64(0);
    if (budget >= movers) return 0;
    if (movers > RANKED_MOVERS) {
      return cut_by_selection(plan.keys(), movers, budget, plan.tau, s.histogram, s.scratch);
    }
    const word64 key = arch::thread() < movers ? arch::load_fresh(plan.keys() + arch::thread()) : 0;
    return cut_by_ranking(key, movers, budget, plan.tau, s.rank);
  }

  ATTANCHOR_DEVICE void mark_hosts(word64 cut) const {
    for (int mover = arch::thread(); mover < movers; mover += THREADS) {
      const word64 key = arch::load_fresh(plan.keys() + mover);
      if (plan.inserted(key, mover, cut)) priority[plan.host_slot(key)] = word64(HOST) << TIER_AT;
    }
    arch::sync_block();
  }

  // Every token's word and, where no match tile has written it, its relevance; returns how many tokens there are.
  ATTANCHOR_DEVICE int rank_tokens() {
    const int stretch = ceil_div(slots, THREADS), from = arch::thread() * stretch;
    const int to = from + stretch < slots ? from + stretch : slots;
    int rank = from;  // among the placeholders
    if (p.rows.merges) {
      int own = 0, total;
      for (int slot = from; slot < to; slot++) own += is_placeholder(load_role(p, plan.sample, slot));
      rank = block_sum_before(own, total, s.scratch);
    }
    float* const relevance = p.drop.relevance + static_cast<int64_t>(plan.sample) * images;
    int tokens[1] = {0};
#pragma unroll 1
    for (int slot = from; slot < to; slot++) {
      const int role = load_role(p, plan.sample, slot);
      // In the merge form values belong to features, in the build form to images.
      const int64_t feature = p.rows.merges ? int64_t(feature_base) + rank : int64_t(plan.sample) * images + slot;
      rank += is_placeholder(role);
      const bool there = role == IMAGE && feature < p.rows.features;
      if (!there && slot < images) relevance[slot] = NO_SCORE;
      if (role != IMAGE) continue;
      tokens[0]++;
      float value = NO_SCORE;
      if (there) value = p.drop.salience == nullptr ? arch::load_fresh(relevance + slot) : p.drop.salience[feature];
      if (!(value == value)) value = NO_SCORE;
      const bool hosts = arch::load_fresh(priority + slot) != 0;
      const word64 key = (hosts ? word64(HOST) : word64(OTHER)) << TIER_AT |
                         encode_key(value, 0) >> 32 << PRIORITY_AT | ((1u << PRIORITY_AT) - 1 - slot);
      priority[slot] = key;
      const int cell = there && p.drop.cells != nullptr ? p.drop.cells[feature] : -1;
      if (cell >= 0 && cell < images) arch::maximize(best + cell, key);
    }
    block_sum(tokens, s.scratch);
    return tokens[0];
  }

  // The best of a cell is a host if any of the cell is one.
  ATTANCHOR_DEVICE void prefer_cells() const {
    if (arch::thread() == 0) arch::fence();
    arch::sync_block();
    for (int cell = arch::thread(); cell < images; cell += THREADS) {
      const word64 key = arch::load_fresh(best + cell);
      if (key == 0) continue;
      best[cell] = 0;
      const int slot = (1u << PRIORITY_AT) - 1 - (static_cast<uint32_t>(key) & ((1u << PRIORITY_AT) - 1));
      if (key >> TIER_AT == OTHER) priority[slot] = key + (word64(BEST_OF_CELL - OTHER) << TIER_AT);
    }
    arch::sync_block();
  }

  ATTANCHOR_DEVICE bool is_kept(int role, int slot, word64 least) const {
    return role == IMAGE && arch::load_fresh(priority + slot) >= least;
  }

  struct Run {
    bool any, kept;
  };

  // The tokens that end right before slot `end`, a multiple of 32, by a warp: whether there are any, and any is kept.
  ATTANCHOR_DEVICE Run find_run(int end, word64 least) const {
    Run run = {false, false};
#pragma unroll 1
    for (int first = end - 32; first >= 0; first -= 32) {
      const int slot = first + arch::lane(), role = load_role(p, plan.sample, slot);
      const uint32_t limits = arch::ballot(role != IMAGE), kept = arch::ballot(is_kept(role, slot, least));
      const uint32_t tokens = limits == 0 ? ~0u : ~((2u << arch::highest_bit(limits)) - 1);
      run.any |= tokens != 0;
      run.kept |= (kept & tokens) != 0;
      if (limits != 0 || run.kept) break;
    }
    return run;
  }

  // The slots that stay of 32 from `first` on, by a warp. A silent row stays if a token does of those between it and the
  // last slot before it that is none, or if there are none.
  ATTANCHOR_DEVICE uint32_t find_stays(int first, word64 least) const {
    const int lane = arch::lane(), role = load_role(p, plan.sample, first + lane);
    const uint32_t limits = arch::ballot(role != IMAGE), silent = arch::ballot(role == SILENT_IMAGE);
    const uint32_t kept = arch::ballot(is_kept(role, first + lane, least));
    Run before = {false, false};
    if ((limits & (0u - limits) & silent) != 0) before = find_run(first, least);
    const uint32_t below = (1u << lane) - 1, last = limits & below;
    const uint32_t between = last == 0 ? below : below & ~((2u << arch::highest_bit(last)) - 1);
    const bool any = between != 0 || (last == 0 && before.any);
    const bool one = (kept & between) != 0 || (last == 0 && before.kept);
    return kept | arch::ballot(role == SILENT_IMAGE ? one || !any : is_real(role) && role != IMAGE);
  }

  // A bit for each slot and the sums before them. Clears what ranked the tokens.
  ATTANCHOR_DEVICE void publish(word64 least) const {
    const int count = p.drop.words;
    word64* const words = p.drop.survivors + static_cast<int64_t>(plan.sample) * count;
#pragma unroll 1
    for (int word = arch::warp(); word < count; word += WARPS) {
      const uint32_t stays = find_stays(word * 32, least);
      if (arch::lane() == 0) words[word] = stays;
    }
    arch::sync_block();
    int running = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += THREADS) {
      const int word = first + arch::thread();
      const word64 stays = word < count ? arch::load_fresh(words + word) : 0;
      int total;
      const int before = block_sum_before(arch::count_bits(static_cast<uint32_t>(stays)), total, s.scratch);
      if (word < count) words[word] = static_cast<word64>(running + before) << 32 | stays;
      running += total;
    }
    for (int slot = arch::thread(); slot < slots; slot += THREADS) priority[slot] = 0;
  }
};

// What the last match item of a sample does: the survivors and the cut of the budget, published with one more arrival.
ATTANCHOR_RARE void select_survivors(const Problem& p, SurvivorsShared& s, int sample, int movers, int feature_base) {
  const word64 cut = SurvivorSelection(p, s, sample, movers, feature_base).run();
  if (arch::thread() == 0) p.state.cuts[sample] = cut;
}

}  // namespace attanchor
