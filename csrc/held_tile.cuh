// Assemble for clusters that still hold a tile's image rows in shared memory: they are read from memory once.
//
// The blocks of a cluster all work out the places of their tile's image slots and of a share of the other slots; each
// writes the fields of every CLUSTER-th of them and copies its own columns of all their rows: image rows from shared
// memory, where the match left them, text rows from L2, where the match read them.
//
// For a sorted list of slots, what comes before each is counted at once: every item adds one to the bucket of the first
// entry behind it, and a sum over the buckets gives each entry the number of items before it.
#pragma once

#include "match.cuh"
#include "plan.cuh"

namespace attanchor {

constexpr int LIST = 64;           // image slots of a tile, and other slots at a time
constexpr int ENTRIES = 2 * LIST;  // images first

struct HeldShared {
  word64 rank[RANKED_MOVERS + 1];
  word64 keys[STAGED_KEYS];
  word64 key[ENTRIES];
  RowJob job[ENTRIES];
  int slot[ENTRIES];                                   // rising in each half, INT_MOST: none
  int hosted[ENTRIES], real[ENTRIES], texts[ENTRIES];  // buckets
  int mover[ENTRIES];                                  // -1: is not inserted
  int copy_place[ENTRIES];                             // -1: no copy
  int host_real[ENTRIES];                              // real slots through the host
  int scratch[6 * WARPS];
  unsigned arrived;
};

template <int IMAGES, int CLUSTER>
struct HeldTile {
  static_assert(IMAGES <= LIST, "a tile's images fit in the list");

  const Problem& p;
  HeldShared& s;
  Plan plan;
  const int rank;  // in the cluster
  const int feature_base;
  const HeldRows<IMAGES>& held;
  int real = 0, movers = 0, images = 0;  // of the sample

  ATTANCHOR_DEVICE HeldTile(const Problem& problem, HeldShared& shared, int in_cluster, int sample, int base,
                            const HeldRows<IMAGES>& rows)
      : p(problem), s(shared), plan(problem, sample), rank(in_cluster), feature_base(base), held(rows) {
    const Counts counts = count_slots(p, sample, 0, s.scratch);
    real = counts.real;
    movers = !p.rows.merges ? p.movers : p.image_into_text ? counts.images : counts.texts;
    images = p.rows.merges ? counts.images : p.rows.images;
  }

  // The sample's match work is done. `from_shared`: the held rows are this tile's. `meanwhile` is called before the copy.
  template <class Meanwhile>
  ATTANCHOR_DEVICE void run(int tile, word64 cut, bool from_shared, const Meanwhile& meanwhile) {
    const int others = p.rows.slots - images, begin = share_of(others, tile), end = share_of(others, tile + 1);
    // Placeholders without a feature may be more than all tiles together have rows: they are dealt out in turn.
    const int first_image = tile * IMAGES, all_tiles = p.match_tiles * IMAGES;
    for (int pass = 0; pass == 0 || begin + pass * LIST < end || first_image + pass * all_tiles < images; pass++) {
      list_slots(first_image + pass * all_tiles, begin + pass * LIST, end);
      const int inserted = count_before(cut);
      const int length = real + inserted, start = p.pad_left ? p.capacity - length : 0;
      write_entries(first_image + pass * all_tiles, cut, start);
      if (pass == 0) pad(tile, length);
      arch::sync_block();  // the jobs are written
      meanwhile();
      if (p.embeds != nullptr) copy_entries(from_shared);
      arch::sync_block();
    }
  }

 private:
  // Where the share of a tile begins, of `count` things dealt out over the tiles of a sample.
  ATTANCHOR_DEVICE int share_of(int count, int tile) const {
    return static_cast<int>(static_cast<int64_t>(count) * tile / p.match_tiles);
  }

  // The images of the tile from the rank `first_image` on, and the other slots of the ranks `first` … `end` - 1.
  ATTANCHOR_DEVICE void list_slots(int first_image, int first, int end) {
    const int at = arch::thread(), image = first_image + at, other = first + at - LIST;
    if (p.rows.merges) {
      find_slots(p, plan.sample, Kind::image, first_image, IMAGES, s.slot, s.scratch);
      find_slots(p, plan.sample, Kind::other, first, LIST, s.slot + LIST, s.scratch);
    } else if (at < LIST) {
      s.slot[at] = image < images ? image : -1;
    } else if (at < ENTRIES) {
      s.slot[at] = images + other;
    }
    const bool listed = at < LIST ? at < IMAGES : other < end;
    arch::sync_block();
    if (at < ENTRIES) {
      if (!listed || s.slot[at] < 0) s.slot[at] = INT_MOST;
      s.hosted[at] = s.real[at] = s.texts[at] = 0;
      s.copy_place[at] = s.mover[at] = -1;
    }
    arch::sync_block();
  }

  // Adds one to the bucket of the first entry of each half that lies behind `slot`.
  ATTANCHOR_DEVICE void add_behind(int* buckets, int slot) {
    ATTANCHOR_UNROLL
    for (int half = 0; half < ENTRIES; half += LIST) {
      const int* list = s.slot + half;
      int at = 0;  // entries known not to lie behind
      ATTANCHOR_UNROLL
      for (int step = LIST / 2; step > 0; step /= 2) at += list[at + step - 1] <= slot ? step : 0;
      at += list[at] <= slot;
      if (at < LIST) arch::add_shared(buckets + half + at, 1);
    }
  }

  // Turns buckets into counts of what lies before each entry.
  ATTANCHOR_DEVICE void sum_buckets(int* buckets) {
    const int at = arch::thread(), own = at < ENTRIES ? buckets[at] : 0;
    int total;
    const int before = block_sum_before(own, total, s.scratch);
    if (at == LIST) s.scratch[WARPS] = before;
    arch::sync_block();
    if (at < ENTRIES) buckets[at] = before + own - (at < LIST ? 0 : s.scratch[WARPS]);
    arch::sync_block();
  }

  // Counts inserted movers by host, real slots and matched texts before every entry; returns all that are inserted.
  ATTANCHOR_DEVICE int count_before(word64 cut) {
    int inserted[1] = {0};
#pragma unroll 1
    for (int mover = arch::thread(); mover < movers; mover += THREADS) {
      const word64 key = plan.key(mover);
      if (!plan.inserted(key, mover, cut)) continue;
      inserted[0]++;
      add_behind(s.hosted, plan.host_slot(key));
    }
    if (!all_real(p)) {
#pragma unroll 1
      for (int slot = arch::thread(); slot < p.rows.slots; slot += THREADS) {
        const int role = load_role(p, plan.sample, slot);
        if (is_real(role)) add_behind(s.real, slot);
        if (p.rows.merges && role == ANCHOR_TEXT) add_behind(s.texts, slot);
      }
    }
    block_sum(inserted, s.scratch);
    sum_buckets(s.hosted);
    if (!all_real(p)) sum_buckets(s.real);
    if (p.rows.merges) sum_buckets(s.texts);
    return inserted[0];
  }

  // Thread t for entry t: its places, a share of the fields, and what is made of its row.
  ATTANCHOR_DEVICE void write_entries(int first_image, word64 cut, int start) {
    const int at = arch::thread();
    Slot own = {};
    if (at < ENTRIES && s.slot[at] != INT_MOST) {
      own.slot = s.slot[at];
      own.exists = true;
      const int role = load_role(p, plan.sample, own.slot);
      own.real = is_real(role);
      own.real_before = all_real(p) ? own.slot : s.real[at];
      own.complete(p, plan.sample, role, first_image + at, s.texts[at], feature_base);
    }
    if (at < ENTRIES) {
      s.key[at] = own.moves ? plan.key(own.mover) : 0;
      if (own.moves && plan.inserted(s.key[at], own.mover, cut)) s.mover[at] = own.mover;
    }
    arch::sync_block();
#pragma unroll 1
    for (int entry = arch::warp(); entry < ENTRIES; entry += WARPS) {
      if (s.mover[entry] < 0) continue;
      const int host = plan.host_slot(s.key[entry]), host_real = count_real_through(p, plan.sample, host);
      const int place = plan.order_copy(movers, cut, s.mover[entry], host, host_real);
      if (arch::lane() > 0) continue;
      s.copy_place[entry] = place;
      s.host_real[entry] = host_real;
    }
    arch::sync_block();
    if (at >= ENTRIES) return;
    const int original = own.real ? own.real_before + s.hosted[at] : -1, copy = s.copy_place[at];
    if (own.exists && at % CLUSTER == rank) {
      plan.write_slot(own, {original, copy, plan.host_slot(s.key[at]), s.host_real[at], s.key[at]}, start);
    }
    s.job[at] = plan.row_job(own, original, copy, start);
  }

  // This tile's share of the padding: fields by one block of the cluster each, zeros by all.
  ATTANCHOR_DEVICE void pad(int tile, int length) {
    const int count = p.capacity - length, begin = share_of(count, tile), end = share_of(count, tile + 1);
    const int first = p.pad_left ? 0 : length;
#pragma unroll 1
    for (int nth = begin + rank + arch::thread() * CLUSTER; nth < end; nth += THREADS * CLUSTER) {
      plan.write_padding(first + nth);
    }
    if (p.embeds == nullptr) return;
#pragma unroll 1
    for (int nth = begin + arch::warp(); nth < end; nth += WARPS) {
      copy_columns({nullptr, {plan.sequence_row(first + nth), nullptr}, Filling::zero}, nullptr);
    }
  }

  ATTANCHOR_DEVICE void copy_entries(bool from_shared) {
#pragma unroll 1
    for (int entry = arch::warp(); entry < ENTRIES; entry += WARPS) {
      const RowJob& job = s.job[entry];
      if (job.to[0] == nullptr && job.to[1] == nullptr) continue;
      const bool is_held = from_shared && entry < LIST && job.filling == Filling::none;
      if (!is_held || !p.bulk) {
        copy_columns(job, is_held ? held.row(entry) : nullptr);
      } else if (arch::lane() == 0) {
        if (job.to[0] != nullptr) held.store(entry, job.to[0]);
        if (job.to[1] != nullptr) held.store(entry, job.to[1]);
      }
    }
  }

  // This block's columns of a row, by a warp; from `shared` if that is given.
  ATTANCHOR_DEVICE void copy_columns(const RowJob& job, const uint8_t* shared) const {
    constexpr int AHEAD = 4;
    const arch::Policy once = arch::drop_from_l2();
    const int64_t begin = held.first;
    const int count = held.bytes / 16;
    const auto filling = filled<arch::Vector>(job.filling == Filling::nan ? p.rows.nan : 0);
    for (int start = arch::lane(); start < count; start += 32 * AHEAD) {
      arch::Vector row[AHEAD];
      ATTANCHOR_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        const int at = start + i * 32;
        row[i] = filling;
        if (at >= count || job.filling != Filling::none) continue;
        if (shared != nullptr) {
          row[i] = reinterpret_cast<const arch::Vector*>(shared)[at];
        } else {
          row[i] = arch::load_stream(reinterpret_cast<const arch::Vector*>(job.from + begin) + at, once);
        }
      }
      ATTANCHOR_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        const int at = start + i * 32;
        if (at >= count) continue;
        for (int copy = 0; copy < 2; copy++) {
          if (job.to[copy] == nullptr) continue;
          arch::store_stream(reinterpret_cast<arch::Vector*>(job.to[copy] + begin) + at, row[i]);
        }
      }
    }
  }
};

}  // namespace attanchor
