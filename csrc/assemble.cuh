// Assemble: the plan of a tile of consecutive slots, and the copy of their rows from global memory.
//
// Tile t writes the rows of its slots, wherever they go, and the t-th stretch of the padding.
#pragma once

#include "plan.cuh"
#include "survivors.cuh"

namespace attanchor {

constexpr int TILE_ROWS = 32;  // at most: lane r of warp 0 works out slot r

struct AssembleShared {
  word64 rank[RANKED_MOVERS + 1];
  word64 keys[STAGED_KEYS];
  RowJob copy[TILE_ROWS];
  RowJob padding[TILE_ROWS];
  word64 key[TILE_ROWS];
  int mover[TILE_ROWS];       // -1: is not inserted
  int copy_place[TILE_ROWS];  // relative to the beginning of the sequence, -1: no copy
  int host_real[TILE_ROWS];   // real slots through the host
  int hosted[TILE_ROWS];      // inserted movers with this host
  int scratch[6 * WARPS];
  unsigned arrived;
};

template <bool DROPS = false>
struct AssembleTile {
  const Problem& p;
  AssembleShared& s;
  Plan plan;

  ATTANCHOR_DEVICE AssembleTile(const Problem& problem, AssembleShared& shared, int sample)
      : p(problem), s(shared), plan(problem, sample) {}

  // `arrivals` match items are waited for; then the next ticket is drawn.
  template <class Drawn>
  ATTANCHOR_DEVICE void run(int tile, int feature_base, unsigned arrivals, Drawn& tickets) {
    const int at = arch::thread(), first_slot = tile * p.tile_rows;
    const Counts counts = count_slots(p, plan.sample, first_slot, s.scratch);
    const int movers = !p.rows.merges ? p.movers : p.image_into_text ? counts.images : counts.texts;
    Slot own = {};
    if (arch::warp() == 0) {
      own = describe(first_slot + at, counts, feature_base);
      s.hosted[at] = 0;
      s.copy_place[at] = -1;
    }
    plan.template wait<DROPS>(arrivals, movers);
    tickets.take();
    plan.stage(movers, s.keys);
    tickets.tell();

    const word64 cut = plan.template find_cut<DROPS>(movers, s.rank);
    int sums[2] = {};  // inserted movers, those with a host before the tile
    for (int mover = at; mover < movers; mover += THREADS) {
      const word64 key = plan.key(mover);
      if (!plan.inserted(key, mover, cut)) continue;
      const int host = plan.host_slot(key);
      sums[0]++;
      sums[1] += host < first_slot;
      if (host >= first_slot && host < first_slot + p.tile_rows) arch::add_shared(s.hosted + (host - first_slot), 1);
    }
    block_sum(sums, s.scratch);
    if (arch::warp() == 0) {
      s.key[at] = own.moves ? plan.key(own.mover) : 0;
      s.mover[at] = own.moves && plan.inserted(s.key[at], own.mover, cut) ? own.mover : -1;
    }
    arch::sync_block();
    for (int row = arch::warp(); row < p.tile_rows; row += WARPS) {
      if (s.mover[row] < 0) continue;
      const int host = plan.host_slot(s.key[row]), real = count_real_through(p, plan.sample, host);
      const int kept = DROPS ? Survivors(p, plan.sample).before(host + 1) : real;  // through the host
      const int place = plan.order_copy(movers, cut, s.mover[row], host, kept);
      if (arch::lane() > 0) continue;
      s.copy_place[row] = place;
      s.host_real[row] = real;
    }
    arch::sync_block();
    int kept = counts.real, kept_before = own.real_before;
    bool stays = own.real;
    if constexpr (DROPS) {
      const Survivors survivors(p, plan.sample);
      kept = survivors.before(p.rows.slots);
      if (own.exists) kept_before = survivors.before(own.slot);
      stays = own.exists && survivors.has(own.slot);
      arch::sync_block();  // read before the last reader clears them
    }

    const int length = kept + sums[0], first = p.pad_left ? p.capacity - length : 0;
    if (arch::warp() == 0) {
      const int hosted_before = sums[1] + warp_sum_before(s.hosted[at]);
      write_slot(own, stays ? kept_before + hosted_before : -1, first);
      write_padding(first_slot + at, length);
    }
    arch::sync_block();
    plan.leave(1, p.assemble_tiles, &s.arrived);
    for (int row = arch::warp(); p.embeds != nullptr && row < p.tile_rows; row += WARPS) {
      run_row_job(s.copy[row], p.rows);
      run_row_job(s.padding[row], p.rows);
    }
    plan.template clear<DROPS>(movers, 1, p.assemble_tiles, &s.arrived);
  }

 private:
  // By warp 0, lane r for slot r of the tile.
  ATTANCHOR_DEVICE Slot describe(int slot, const Counts& counts, int feature_base) const {
    const bool in_tile = arch::lane() < p.tile_rows;
    const int role = in_tile ? load_role(p, plan.sample, slot) : PADDING;
    const uint32_t below = (1u << arch::lane()) - 1;
    Slot own = {};
    own.slot = slot;
    own.exists = in_tile && slot < p.rows.slots;
    own.real = is_real(role);
    own.real_before = counts.real_before + arch::count_bits(arch::ballot(own.real) & below);
    const int image = counts.images_before + arch::count_bits(arch::ballot(is_placeholder(role)) & below);
    const int text = counts.texts_before + arch::count_bits(arch::ballot(role == ANCHOR_TEXT) & below);
    own.complete(p, plan.sample, role, image, text, feature_base);
    return own;
  }

  // By warp 0: the fields of one slot, and what is made of its row.
  ATTANCHOR_DEVICE void write_slot(const Slot& own, int original, int first) {
    const int at = arch::lane(), copy = s.copy_place[at];
    plan.write_slot(own, {original, copy, plan.host_slot(s.key[at]), s.host_real[at], s.key[at]}, first);
    s.copy[at] = plan.row_job(own, original, copy, first);
  }

  // By warp 0: lane r for row `nth` of the padding.
  ATTANCHOR_DEVICE void write_padding(int nth, int length) {
    RowJob& job = s.padding[arch::lane()];
    job = {nullptr, {nullptr, nullptr}, Filling::zero};
    if (arch::lane() >= p.tile_rows || nth >= p.capacity - length) return;
    const int place = p.pad_left ? nth : length + nth;
    plan.write_padding(place);
    job.to[0] = plan.sequence_row(place);
  }
};

}  // namespace attanchor
