// Match, plan and copy of every sample in one launch, with any number of blocks.
//
// Work is handed out by tickets: the match tiles of the first `lag` samples, then the match tiles of a sample mixed
// with the assemble tiles of the one `lag` before it, then the assemble tiles of the last `lag` samples. Whoever waits
// for a sample so holds a later ticket than every match tile of it, and match work never waits: the unfinished item
// with the lowest ticket always goes on. No deadlock, whatever the grid and whatever else runs on the device; nor where a
// cluster draws its next ticket before it is done with an item, since it waits for none that comes behind that.
#pragma once

#include "assemble.cuh"
#include "match.cuh"
#include "tickets.cuh"

namespace attanchor {

struct Work {
  bool matches;
  int sample;
  int item;
};

// What a ticket below the total stands for. `assemble_items` are those of a sample, a cluster's worth of tiles each.
ATTANCHOR_DEVICE Work work_of(const Problem& p, int assemble_items, unsigned ticket) {
  const unsigned matches = p.match_tiles, assembles = assemble_items, both = matches + assembles;
  const unsigned head = p.lag * matches, middle = (p.batch - p.lag) * both;
  if (ticket < head) return {true, static_cast<int>(ticket / matches), static_cast<int>(ticket % matches)};
  ticket -= head;
  if (ticket < middle) {
    const int group = ticket / both;
    const uint64_t nth = ticket % both;
    const unsigned before = nth * matches / both, through = (nth + 1) * matches / both;
    if (through > before) return {true, p.lag + group, static_cast<int>(before)};
    return {false, group, static_cast<int>(nth - before)};
  }
  ticket -= middle;
  return {false, p.batch - p.lag + static_cast<int>(ticket / assembles), static_cast<int>(ticket % assembles)};
}

template <class E, int IMAGES, int CLUSTER, bool DROPS>
struct ConstructShared {
  union {
    typename MatchTile<E, IMAGES, CLUSTER, false, DROPS>::Shared match;
    AssembleShared assemble;
    SurvivorsShared survivors;
  };
  unsigned ticket[2];
};

// A match tile is done: the last one of a sample with a large budget also finds the cut.
template <class Shared>
ATTANCHOR_DEVICE void finish_match(const Problem& p, Shared& s, int sample, int movers, unsigned items) {
  if (!publishes_cut(p, movers)) {
    arch::sync_block();  // every thread's maxima are out before one thread says so
    if (arch::thread() == 0) say_done(matched(p, sample));
    return;
  }
  if (!is_last(matched(p, sample), items, &s.arrived)) return;
  int* histogram = reinterpret_cast<int*>(s.best);
  const word64* keys = p.state.keys + static_cast<int64_t>(sample) * p.movers;
  const word64 cut = cut_by_selection(keys, movers, p.budget, threshold(p), histogram, s.scratch);
  if (arch::thread() == 0) {
    p.state.cuts[sample] = cut;
    say_done(matched(p, sample));
  }
}

// A match tile is done where tokens are dropped: the last one of a sample finds out which stay.
ATTANCHOR_DEVICE void finish_match_dropping(const Problem& p, SurvivorsShared& s, int sample, int movers,
                                            unsigned items, int feature_base) {
  if (!is_last(matched(p, sample), items, &s.arrived)) return;
  select_survivors(p, s, sample, movers, feature_base);
  arch::sync_block();  // every thread's words are out before one thread says so
  if (arch::thread() == 0) say_done(matched(p, sample));
}

template <class E, int IMAGES, int CLUSTER, bool DROPS>
ATTANCHOR_DEVICE void construct(const Problem& p) {
  auto& s = *reinterpret_cast<ConstructShared<E, IMAGES, CLUSTER, DROPS>*>(arch::shared_memory());
  const int rank = arch::cluster_rank<CLUSTER>();
  const int assemble_items = ceil_div(p.assemble_tiles, CLUSTER);
  const unsigned total = p.batch * static_cast<unsigned>(p.match_tiles + assemble_items);
  const unsigned arrivals = p.match_tiles * CLUSTER;
  FeatureBase match_base, assemble_base;
  Tickets<CLUSTER> tickets{p, s.ticket, rank, total};
  Stamps stamps{p};
  for (unsigned ticket = tickets.first(); ticket < total; ticket = tickets.next(), stamps.next()) {
    stamps.reach(Phase::begun);
    const Work work = work_of(p, assemble_items, ticket);
    if (work.matches) {
      const int base = p.rows.merges ? match_base.advance(p, work.sample, s.match.scratch) : 0;
      MatchTile<E, IMAGES, CLUSTER, false, DROPS> tile(p, s.match, rank, work.sample);
      const int movers = tile.run(work.item, base, stamps, [&] { tickets.draw(); });
      if constexpr (DROPS) {
        finish_match_dropping(p, s.survivors, work.sample, movers, arrivals, base);
      } else {
        finish_match(p, s.match, work.sample, movers, arrivals);
      }
    } else {
      const int base = p.rows.merges ? assemble_base.advance(p, work.sample, s.assemble.scratch) : 0;
      const int tile = work.item * CLUSTER + rank;
      if (tile < p.assemble_tiles) AssembleTile<DROPS>(p, s.assemble, work.sample).run(tile, base, arrivals, tickets);
    }
  }
}

// Two blocks share a multiprocessor: one copies while the other waits.
template <class E, int IMAGES, int CLUSTER, bool DROPS>
ATTANCHOR_KERNEL(THREADS, 2) construct_kernel(ATTANCHOR_ARGUMENT(Problem) p) {
  if constexpr (CLUSTER <= arch::LARGEST_CLUSTER) {
    construct<E, IMAGES, CLUSTER, DROPS>(p);
  } else {
    arch::fail("the kernel was not compiled for clusters");
  }
}

// --- The launch ------------------------------------------------------------------------------------------------------

// One compiled shape of the kernel.
struct Variant {
  int images;
  int cluster;
  bool holds;  // keeps its tile in shared memory, beyond shared_bytes
  int shared_bytes;
  void (*kernel)(Problem);
};

template <class E, int IMAGES, int CLUSTER, bool DROPS = false>
Variant variant() {
  constexpr int shared = static_cast<int>(sizeof(ConstructShared<E, IMAGES, CLUSTER, DROPS>));
  return {IMAGES, CLUSTER, false, shared, construct_kernel<E, IMAGES, CLUSTER, DROPS>};
}

// The variants of an element type, and how many there are; each in a file of its own, to compile side by side.
struct Variants {
  const Variant* list;
  int count;
};
Variants float_variants();
Variants half_variants();
Variants bfloat_variants();
Variants drop_float_variants();
Variants drop_half_variants();
Variants drop_bfloat_variants();
Variants held_float_variants();
Variants held_half_variants();
Variants held_bfloat_variants();

}  // namespace attanchor
