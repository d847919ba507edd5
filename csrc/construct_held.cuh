// Match, plan and copy in one launch, by clusters that keep their tile on chip between match and copy.
//
// Tickets are match tiles, sample after sample. After a tile a cluster first draws its next ticket, then decides:
//
//     a tile of the same sample    match it too; the rows it held are given up, and read again when they are copied
//     a tile of a later sample,    every tile of its sample has been drawn: wait for the sample, copy, then go on
//     or nothing left
//
// So a cluster that waits for a sample has every tile of it drawn, and holds at most an unmatched tile of a later one.
// Whoever waits, waits for work on the same sample or for one that waits for an earlier sample: never in a circle.
#pragma once

#include "construct.cuh"
#include "held_tile.cuh"

namespace attanchor {

constexpr int MOST_HELD_TILES = 2048;  // tiles of a sample, a bit each

template <class E, int IMAGES, int CLUSTER>
struct ConstructHeldShared {
  union {
    typename MatchTile<E, IMAGES, CLUSTER, true>::Shared match;
    HeldShared assemble;
  };
  uint32_t given_up[MOST_HELD_TILES / 32];
  FeatureBase base;  // merge form: of the sample that is owed
  word64 arrivals[MOST_STRETCHES];
  unsigned ticket[2];
};

// Bytes from one row that a block holds to the next: the most chunks of any block, and 16 bytes that shift the banks.
inline int64_t held_pitch(int64_t row_bytes, int cluster) {
  const int64_t chunks = (row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
  return (chunks + cluster - 1) / cluster * CHUNK_BYTES + 16;
}

// What a cluster still has to copy, of one sample.
struct Owed {
  int sample = -1;
  int held_tile = -1;
  int given_up = 0;  // how many tiles
};

template <class E, int IMAGES, int CLUSTER>
struct ConstructHeld {
  using Shared = ConstructHeldShared<E, IMAGES, CLUSTER>;
  using Match = MatchTile<E, IMAGES, CLUSTER, true>;
  static constexpr int HELD_AT = (static_cast<int>(sizeof(Shared)) + 127) / 128 * 128;

  const Problem& p;
  Shared& s;
  const int rank;
  HeldRows<IMAGES> held;
  Owed owed;

  ATTANCHOR_DEVICE ConstructHeld(const Problem& problem)
      : p(problem),
        s(*reinterpret_cast<Shared*>(arch::shared_memory())),
        rank(arch::cluster_rank<CLUSTER>()),
        held(p, rank, CLUSTER, arch::shared_memory() + HELD_AT, s.arrivals) {}

  ATTANCHOR_DEVICE void run() {
    const unsigned total = static_cast<unsigned>(p.batch) * p.match_tiles;
    for (int word = arch::thread(); word < MOST_HELD_TILES / 32; word += THREADS) s.given_up[word] = 0;
    if (arch::thread() == 0) {
      s.base = FeatureBase();
      held.start_barriers();
    }
    for (unsigned turn = 0;; turn ^= 1) {
      const unsigned ticket = draw_ticket<CLUSTER>(p, s.ticket + turn, rank, total);
      const int sample = ticket < total ? static_cast<int>(ticket / p.match_tiles) : -1;
      if (owed.sample >= 0 && sample != owed.sample) settle();
      if (sample < 0) break;
      if (owed.held_tile >= 0) give_up();
      if (p.rows.merges && sample != s.base.sample) advance_base(sample);
      owed.sample = sample;
      owed.held_tile = static_cast<int>(ticket % p.match_tiles);
      const int movers = Match(p, s.match, rank, sample, &held).run(owed.held_tile, s.base.base);
      finish_match(p, s.match, owed.sample, movers, p.match_tiles * CLUSTER);
    }
    arch::wait_bulk_stores();  // they read shared memory, which ends with the block
  }

 private:
  ATTANCHOR_DEVICE void advance_base(int sample) {
    FeatureBase next = s.base;
    next.advance(p, sample, s.match.scratch);
    if (arch::thread() == 0) s.base = next;
    arch::sync_block();
  }

  ATTANCHOR_DEVICE void give_up() {
    if (arch::thread() == 0) s.given_up[owed.held_tile / 32] |= 1u << owed.held_tile % 32;
    owed.given_up++;
  }

  // Copy everything owed of a sample, all of whose tiles have been drawn.
  ATTANCHOR_DEVICE void settle() {
    HeldTile<IMAGES, CLUSTER> tiles(p, s.assemble, rank, owed.sample, s.base.base, held);
    tiles.plan.wait(p.match_tiles * CLUSTER, tiles.movers);
    const int last = owed.given_up > 0 ? p.match_tiles : owed.held_tile + 1;
    for (int tile = owed.given_up > 0 ? 0 : owed.held_tile; tile < last; tile++) {
      const bool given_up = s.given_up[tile / 32] >> tile % 32 & 1;
      if (given_up || tile == owed.held_tile) tiles.run(tile, !given_up);
    }
    tiles.plan.leave(tiles.movers, 1 + owed.given_up, p.match_tiles * CLUSTER, &s.assemble.arrived);
    arch::sync_block();
    for (int word = arch::thread(); owed.given_up > 0 && word < MOST_HELD_TILES / 32; word += THREADS) {
      s.given_up[word] = 0;
    }
    owed = Owed();
    arch::sync_block();
  }
};

template <class E, int IMAGES, int CLUSTER>
ATTANCHOR_KERNEL(THREADS, 2) construct_held_kernel(ATTANCHOR_ARGUMENT(Problem) p) {
  if constexpr (CLUSTER <= arch::LARGEST_CLUSTER) {
    gather_cluster<CLUSTER>();
    ConstructHeld<E, IMAGES, CLUSTER>(p).run();
  } else {
    arch::fail();
  }
}

template <class E, int IMAGES, int CLUSTER>
Variant held_variant() {
  constexpr int shared = ConstructHeld<E, IMAGES, CLUSTER>::HELD_AT;
  return {IMAGES, CLUSTER, true, shared, construct_held_kernel<E, IMAGES, CLUSTER>};
}

}  // namespace attanchor
