// The plan: from the keys of all movers to where every row goes.
//
// With `first` the row where the sequence begins,
//
//     place of a slot             = first + real slots before it        + inserted movers with a host before it
//     place of an inserted mover  = first + real slots through its host + inserted movers before it by (host, mover)
//
// so no block needs more than the movers' keys, and none needs a sum over other blocks' results.
#pragma once

#include "copy.cuh"
#include "keys.cuh"
#include "slots.cuh"
#include "stamps.cuh"

namespace attanchor {

// What is known of a slot before any key is read.
struct Slot {
  int slot;
  bool exists, real, moves, reports;
  int mover;    // among its kind
  int report;   // its column in `host` and `score`
  int feature;  // -1: a text
  int real_before;

  // From its role, and its rank among the placeholders and among the matched texts (counted in the merge form only).
  ATTANCHOR_DEVICE void complete(const Problem& p, int sample, int role, int image, int text, int feature_base) {
    if (p.rows.merges) {
      feature = is_placeholder(role) ? feature_base + image : -1;
      moves = role == (p.image_into_text ? IMAGE : ANCHOR_TEXT);
      mover = p.image_into_text ? image : text;
      report = slot;
      reports = exists;
    } else {
      feature = slot < p.rows.images ? sample * p.rows.images + slot : -1;
      mover = report = p.image_into_text ? slot : slot - p.rows.images;
      moves = reports = exists && mover >= 0 && mover < p.movers;
    }
  }
};

// Where a slot's row and its copy go, relative to the beginning of the sequence; -1: nowhere.
struct Places {
  int original, copy;
  int host;       // of the copy
  int host_real;  // real slots through the host
  word64 key;     // of the mover, 0: none
};

constexpr int STAGED_KEYS = 3072;  // of a sample, as many as fit where a match tile's chunks were

// The steps that every way to assemble a sample takes.
struct Plan {
  static constexpr int LEAVER = 32;  // the thread that says when the block has read the keys

  const Problem& p;
  int sample;
  const float tau;
  const word64* staged = nullptr;  // the keys in shared memory, once they are there

  ATTANCHOR_DEVICE Plan(const Problem& problem, int of_sample)
      : p(problem), sample(of_sample), tau(threshold(problem)) {}

  ATTANCHOR_DEVICE word64* keys() const { return p.state.keys + static_cast<int64_t>(sample) * p.movers; }

  // Until all match work of the sample, `arrivals` items and the cut where one is published, is done. By the block. With
  // DROPS the cut always is, and the survivors with it.
  template <bool DROPS = false>
  ATTANCHOR_DEVICE void wait(unsigned arrivals, int movers) const {
    if (arch::thread() == 0) {
      const unsigned enough = arrivals + (DROPS || publishes_cut(p, movers));
      for (const Patience patience("a block waited in vain for the match of a sample");
           arch::load_acquire(matched(p, sample)) < enough; arch::pause()) {
        patience.check();
      }
    }
    arch::sync_block();
  }

  // Read the keys once for all steps to come, if there are no more than STAGED_KEYS, to `shared`. By the block.
  ATTANCHOR_DEVICE void stage(int movers, word64* shared) {
    if (movers > STAGED_KEYS) return;
#pragma unroll 2
    for (int mover = arch::thread(); mover < movers; mover += THREADS) {
      shared[mover] = arch::load_fresh(keys() + mover);
    }
    staged = shared;
    arch::sync_block();
  }

  ATTANCHOR_DEVICE word64 key(int mover) const {
    return staged != nullptr ? staged[mover] : arch::load_fresh(keys() + mover);
  }

  // By the block; `shared` holds RANKED_MOVERS + 1 words.
  template <bool DROPS = false>
  ATTANCHOR_DEVICE word64 find_cut(int movers, word64* shared) const {
    if (!DROPS && !p.budgeted) return 0;
    if (DROPS || publishes_cut(p, movers)) return arch::load_fresh(p.state.cuts + sample);
    return cut_by_ranking(arch::thread() < movers ? key(arch::thread()) : 0, movers, p.budget, tau, shared);
  }

  ATTANCHOR_DEVICE bool inserted(word64 key, int mover, word64 cut) const {
    const word64 rank = rank_key(key, mover, tau);
    return rank != 0 && rank >= cut;
  }

  // In the build form keys hold the index among the hosts.
  ATTANCHOR_DEVICE int host_slot(word64 key) const {
    return key_index(key) + (p.image_into_text && !p.rows.merges ? p.rows.images : 0);
  }

  // Where the copy of an inserted mover goes, by a warp.
  ATTANCHOR_DEVICE int order_copy(int movers, word64 cut, int own, int host, int host_real) const {
    int before = 0;
#pragma unroll 2
    for (int mover = arch::lane(); mover < movers; mover += 32) {
      const word64 key = this->key(mover);
      const int other = host_slot(key);
      before += inserted(key, mover, cut) && (other < host || (other == host && mover < own));
    }
    return host_real + warp_sum(before);
  }

  // What was published of the sample has been read. After a barrier of the block behind the last read. Of `readers`
  // blocks-times-tiles these are `count`.
  ATTANCHOR_DEVICE void leave(unsigned count, unsigned readers, unsigned* shared) const {
    if (arch::thread() == LEAVER) ask_last(left(p, sample), count, readers, shared);
  }

  // The last who left puts everything back to zero for the next launch. Later, when the counter has answered.
  template <bool DROPS = false>
  ATTANCHOR_DEVICE void clear(int movers, unsigned count, unsigned readers, const unsigned* shared) const {
    arch::sync_block();
    if (*shared != readers - count) return;
    for (int mover = arch::thread(); mover < movers; mover += THREADS) keys()[mover] = 0;
    if constexpr (DROPS) {
      word64* const words = p.drop.survivors + static_cast<int64_t>(sample) * p.drop.words;
      for (int at = arch::thread(); at < p.drop.words; at += THREADS) words[at] = 0;
    }
    if (arch::thread() == 0) p.state.cuts[sample] = *matched(p, sample) = *left(p, sample) = 0;
  }

  // Every field that one slot decides, by a thread.
  ATTANCHOR_DEVICE void write_slot(const Slot& own, const Places& at, int first) const {
    const int64_t slots = p.rows.slots;
    if (at.original >= 0) {
      write_row(first + at.original, own.slot, own.slot, p.inherit ? own.real_before : at.original, false);
    }
    if (at.copy >= 0) write_row(first + at.copy, own.slot, at.host, p.inherit ? at.host_real - 1 : at.copy, true);
    if (own.reports) {
      const int64_t report = sample * (p.rows.merges ? slots : p.movers) + own.report;
      p.host[report] = at.copy < 0 ? -1 : at.host - (p.image_into_text && !p.rows.merges ? p.rows.images : 0);
      p.score[report] = key_score(at.key);
    }
    if (own.exists) {
      int32_t* places = p.places + sample * 3 * slots + own.slot;
      places[0] = at.original >= 0 ? first + at.original : -1;
      places[slots] = at.copy >= 0 ? first + at.copy : -1;
      places[2 * slots] = own.feature;
    }
  }

  // `position` is overruled by the given id of the slot `seat`, if any is.
  ATTANCHOR_DEVICE void write_row(int place, int slot, int seat, int position, bool is_anchor) const {
    const int64_t at = static_cast<int64_t>(sample) * p.capacity + place;
    p.attention_mask[at] = 1;
    p.source[at] = slot;
    p.is_anchor[at] = is_anchor;
    if (p.position_ids == nullptr) {
      p.new_position_ids[at] = position;
      return;
    }
#pragma unroll 1
    for (int axis = 0; axis < p.axes; axis++) {
      const int64_t plane = static_cast<int64_t>(axis) * p.batch + sample;
      p.new_position_ids[plane * p.capacity + place] = p.position_ids[plane * p.rows.slots + seat];
    }
  }

  // What is made of a slot's row; both places relative to row `first`.
  ATTANCHOR_DEVICE RowJob row_job(const Slot& own, int original, int copy, int first) const {
    const bool missing = own.feature >= p.rows.features;
    return {own.real && !missing ? slot_row(p.rows, sample, own.slot, own.feature) : nullptr,
            {original >= 0 ? sequence_row(first + original) : nullptr, copy >= 0 ? sequence_row(first + copy) : nullptr},
            missing ? Filling::nan : Filling::none};
  }

  ATTANCHOR_DEVICE void write_padding(int place) const {
    const int64_t at = static_cast<int64_t>(sample) * p.capacity + place;
    p.attention_mask[at] = 0;
    p.source[at] = -1;
    p.is_anchor[at] = 0;
#pragma unroll 1
    for (int axis = 0; axis < p.axes; axis++) {
      p.new_position_ids[(static_cast<int64_t>(axis) * p.batch + sample) * p.capacity + place] = 0;
    }
  }

  // The row of `embeds`; null where only the plan is wanted.
  ATTANCHOR_DEVICE uint8_t* sequence_row(int place) const {
    if (p.embeds == nullptr) return nullptr;
    return p.embeds + (static_cast<int64_t>(sample) * p.capacity + place) * p.rows.row_bytes;
  }
};

}  // namespace attanchor
