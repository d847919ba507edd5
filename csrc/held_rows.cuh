// The image rows of a tile that a block keeps in shared memory: its columns of each, row after row.
//
// They come by bulk copies, a stretch of a row each, which one lane of a warp starts and nobody's registers see; and
// from here they go out by bulk copies too. Or, to compare, by the asynchronous copies of stage.cuh and by stores.
#pragma once

#include "stage.cuh"
#include "stamps.cuh"

namespace attanchor {

constexpr int STRETCH_BYTES = 4 * CHUNK_BYTES;  // of a row in one bulk copy: the first are multiplied as the rest comes
constexpr int MOST_STRETCHES = 16;

// The chunks of a row that belong to the blocks of a cluster before `rank`.
ATTANCHOR_DEVICE int first_chunk(const Rows& rows, int rank, int cluster) {
  return static_cast<int>((rows.row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES * rank / cluster);
}

template <int IMAGES>
struct HeldRows {
  uint8_t* memory;
  word64* arrivals;  // a barrier for each stretch
  int64_t first;     // byte of a row
  int bytes;         // of a row
  int pitch;         // from one row to the next, an odd number of 16 bytes
  unsigned loads = 0;

  ATTANCHOR_DEVICE HeldRows(const Problem& p, int rank, int cluster, uint8_t* shared, word64* barriers)
      : memory(shared), arrivals(barriers), pitch(p.held_pitch) {
    first = static_cast<int64_t>(first_chunk(p.rows, rank, cluster)) * CHUNK_BYTES;
    const int64_t end = static_cast<int64_t>(first_chunk(p.rows, rank + 1, cluster)) * CHUNK_BYTES;
    bytes = static_cast<int>((end < p.rows.row_bytes ? end : p.rows.row_bytes) - first);
  }

  // By one thread, before a barrier of the block.
  ATTANCHOR_DEVICE void start_barriers() const {
    for (int stretch = 0; stretch < MOST_STRETCHES; stretch++) arch::start_bulk_barrier(arrivals + stretch, WARPS);
    arch::show_bulk_barriers();
  }

  ATTANCHOR_DEVICE uint8_t* row(int nth) const { return memory + nth * pitch; }

  // Start the rows of a tile on their way; null: not there, becomes zeros. By the block, behind an order_bulk of every
  // thread and a barrier; a tile after the last one's rows have been waited for, and left again by store.
  ATTANCHOR_DEVICE void load(const uint8_t* const* from) const {
    int there = 0;
    for (int nth = arch::warp(); nth < IMAGES; nth += WARPS) there += from[nth] != nullptr;
    if (arch::lane() == 0) {
      const arch::Policy once = arch::drop_from_l2();
#pragma unroll 1
      for (int at = 0; at < bytes; at += STRETCH_BYTES) {
        word64* arrival = arrivals + at / STRETCH_BYTES;
        const int length = bytes - at < STRETCH_BYTES ? bytes - at : STRETCH_BYTES;
        arch::expect_bulk(arrival, there * length);
#pragma unroll 1
        for (int nth = arch::warp(); nth < IMAGES; nth += WARPS) {
          if (from[nth] != nullptr) arch::load_bulk(row(nth) + at, from[nth] + first + at, length, arrival, once);
        }
      }
    }
    // Whole chunks are multiplied: what no copy writes must be zeros.
    const int whole = (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES * CHUNK_BYTES;
#pragma unroll 1
    for (int nth = arch::warp(); nth < IMAGES; nth += WARPS) {
      const int copied = from[nth] != nullptr ? bytes : 0;
      for (int at = copied + arch::lane() * 16; at < whole; at += 32 * 16) {
        *reinterpret_cast<arch::Vector*>(row(nth) + at) = {0, 0, 0, 0};
      }
    }
  }

  // Until the chunk has come; by every thread, once for the first chunk of each stretch.
  ATTANCHOR_DEVICE void wait(int chunk) const {
    if (chunk * CHUNK_BYTES % STRETCH_BYTES == 0) {
      const Patience patience("a block waited in vain for the rows of a tile");
      arch::wait_bulk(arrivals + chunk * CHUNK_BYTES / STRETCH_BYTES, loads & 1, patience);
    }
  }

  // Start a row on its way to where it begins in global memory; by one lane, which waits before the next load.
  ATTANCHOR_DEVICE void store(int nth, uint8_t* to) const {
    if (bytes > 0) arch::store_bulk(to + first, row(nth), bytes);
  }
};

}  // namespace attanchor
