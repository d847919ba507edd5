// Match, plan and copy in one launch, by clusters that keep their tile on chip between match and copy.
//
// Tickets are match tiles, sample after sample. While a tile is on its way its cluster looks whether others of the sample
// are left. If so it draws its next ticket:
//
//     a tile of the same sample    match it too; the rows it held are given up, and read again when they are copied
//     a tile of a later sample,    every tile of its sample has been drawn: wait for the sample, copy, then go on
//     or nothing left
//
// If not, it waits and copies too, and draws in between: a tile that is held by one who waits holds up all of its sample.
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
  FeatureBase base;  // merge form
  word64 arrivals[MOST_STRETCHES];
  unsigned ticket[2];
};

// Bytes from one row that a block holds to the next: the most chunks of any block, and 16 bytes that shift the banks.
inline int64_t held_pitch(int64_t row_bytes, int cluster) {
  const int64_t chunks = (row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
  return (chunks + cluster - 1) / cluster * CHUNK_BYTES + 16;
}

template <class E, int IMAGES, int CLUSTER>
struct ConstructHeld {
  using Shared = ConstructHeldShared<E, IMAGES, CLUSTER>;
  using Match = MatchTile<E, IMAGES, CLUSTER, true>;
  static constexpr int HELD_AT = (static_cast<int>(sizeof(Shared)) + 127) / 128 * 128;

  const Problem& p;
  Shared& s;
  const int rank;
  HeldRows<IMAGES> held;
  Tickets<CLUSTER> tickets;
  Stamps stamps{p};
  int given_up = 0;  // how many tiles of the sample

  ATTANCHOR_DEVICE ConstructHeld(const Problem& problem)
      : p(problem),
        s(*reinterpret_cast<Shared*>(arch::shared_memory())),
        rank(arch::cluster_rank<CLUSTER>()),
        held(p, rank, CLUSTER, arch::shared_memory() + HELD_AT, s.arrivals),
        tickets{p, s.ticket, rank, static_cast<unsigned>(p.batch) * p.match_tiles} {}

  ATTANCHOR_DEVICE void run() {
    for (int word = arch::thread(); word < MOST_HELD_TILES / 32; word += THREADS) s.given_up[word] = 0;
    if (arch::thread() == 0) {
      s.base = FeatureBase();
      held.start_barriers();
    }
    for (unsigned ticket = tickets.first(); ticket < tickets.total; stamps.next()) {
      stamps.reach(Phase::begun);
      const int sample = static_cast<int>(ticket / p.match_tiles), tile = static_cast<int>(ticket % p.match_tiles);
      if (p.rows.merges && sample != s.base.sample) advance_base(sample);
      Match match(p, s.match, rank, sample, &held);
      const unsigned end = (sample + 1u) * p.match_tiles;
      const int movers = match.run(tile, s.base.base, stamps, [&] { tickets.draw_below(end); });
      stamps.reach(Phase::published);
      finish_match(p, s.match, sample, movers, p.match_tiles * CLUSTER);
      stamps.reach(Phase::arrived);
      ticket = tickets.next();
      stamps.reach(Phase::met);
      if (static_cast<int>(ticket / p.match_tiles) == sample) {
        give_up(tile);
      } else {
        settle(sample, tile, ticket == tickets.NONE);
        if (ticket == tickets.NONE) ticket = tickets.next();
      }
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

  ATTANCHOR_DEVICE void give_up(int tile) {
    if (arch::thread() == 0) s.given_up[tile / 32] |= 1u << tile % 32;
    given_up++;
  }

  // Copy the held tile and those given up, of a sample all of whose tiles have been drawn.
  ATTANCHOR_DEVICE void settle(int sample, int held_tile, bool draws) {
    const unsigned own = 1 + given_up, all = p.match_tiles * CLUSTER;
    HeldTile<IMAGES, CLUSTER> tiles(p, s.assemble, rank, sample, s.base.base, held);
    tiles.plan.wait(all, tiles.movers);
    stamps.reach(Phase::waited);
    if (draws) tickets.take();
    tiles.plan.stage(tiles.movers, s.assemble.keys);
    if (draws) tickets.tell();
    const word64 cut = tiles.plan.find_cut(tiles.movers, s.assemble.rank);
    bool leaves = tiles.plan.staged != nullptr;  // once, with nothing more to read
    const auto leave = [&] {
      if (leaves) tiles.plan.leave(own, all, &s.assemble.arrived);
      leaves = false;
      stamps.reach(Phase::planned);  // of the last tile, if several
    };
    const int last = given_up > 0 ? p.match_tiles : held_tile + 1;
    for (int tile = given_up > 0 ? 0 : held_tile; tile < last; tile++) {
      const bool was_given_up = s.given_up[tile / 32] >> tile % 32 & 1;
      if (was_given_up || tile == held_tile) tiles.run(tile, cut, !was_given_up, leave);
    }
    leaves = tiles.plan.staged == nullptr;
    leave();
    tiles.plan.clear(tiles.movers, own, all, &s.assemble.arrived);
    for (int word = arch::thread(); given_up > 0 && word < MOST_HELD_TILES / 32; word += THREADS) s.given_up[word] = 0;
    given_up = 0;
    arch::sync_block();
    stamps.reach(Phase::copied);
  }
};

template <class E, int IMAGES, int CLUSTER>
ATTANCHOR_KERNEL(THREADS, 2) construct_held_kernel(ATTANCHOR_ARGUMENT(Problem) p) {
  if constexpr (CLUSTER <= arch::LARGEST_CLUSTER) {
    ConstructHeld<E, IMAGES, CLUSTER>(p).run();
  } else {
    arch::fail("the kernel was not compiled for clusters");
  }
}

template <class E, int IMAGES, int CLUSTER>
Variant held_variant() {
  constexpr int shared = ConstructHeld<E, IMAGES, CLUSTER>::HELD_AT;
  return {IMAGES, CLUSTER, true, shared, construct_held_kernel<E, IMAGES, CLUSTER>};
}

}  // namespace attanchor
