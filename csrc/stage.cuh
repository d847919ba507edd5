// The chunk pipeline: 128 bytes of every row of a tile at a time, on their way from global to shared memory while
// earlier chunks are multiplied.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace attanchor {

constexpr int CHUNK_BYTES = 128;
constexpr int VECTORS = CHUNK_BYTES / 16;
constexpr int PITCH = CHUNK_BYTES + 16;  // shifts the banks of every row, so that eight rows are read at once
constexpr int STAGES = 4;

// 16 bytes of a row, of which `bytes` (0 … 16) exist, the rest become zero; `width` divides every address. ALIGNED: it
// is 16.
template <bool ALIGNED>
ATTANCHOR_DEVICE void stage_vector(uint8_t* to, const uint8_t* from, int bytes, int width, arch::Policy policy) {
  if (ALIGNED || width == 16) {
    arch::copy_async<16>(to, from, bytes, policy);
  } else if (width >= 4) {
    ATTANCHOR_UNROLL
    for (int at = 0; at < 16; at += 4) {
      // An address past the row's end is formed by nobody.
      const bool exists = at < bytes;
      arch::copy_async<4>(to + at, exists ? from + at : from, exists ? 4 : 0, policy);
    }
  } else {
    ATTANCHOR_UNROLL
    for (int at = 0; at < 16; at += 2) {
      const uint16_t element = at < bytes ? *reinterpret_cast<const uint16_t*>(from + at) : 0;
      *reinterpret_cast<uint16_t*>(to + at) = element;
    }
  }
}

// The rows of a tile as one thread copies them: 8 threads a row, 32 rows at a time.
template <int ROWS, bool ALIGNED>
struct Stager {
  static constexpr int EACH = (ROWS + 31) / 32;

  const uint8_t* from[EACH];  // null: the row is not there and reads as zeros
  arch::Policy policy;

  ATTANCHOR_DEVICE Stager(const uint8_t* const* row, arch::Policy l2) : policy(l2) {
    ATTANCHOR_UNROLL
    for (int i = 0; i < EACH; i++) {
      const int at = arch::thread() / VECTORS + i * 32;
      from[i] = at < ROWS ? row[at] : nullptr;
    }
  }

  // Start the copy of a chunk of every row to `to` and each `pitch` bytes behind it.
  ATTANCHOR_DEVICE void start(uint8_t* to, int pitch, const Rows& rows, int chunk) const {
    const int64_t offset = static_cast<int64_t>(chunk) * CHUNK_BYTES + arch::thread() % VECTORS * 16;
    const int64_t left = rows.row_bytes - offset;
    const int within = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
    ATTANCHOR_UNROLL
    for (int i = 0; i < EACH; i++) {
      const int at = arch::thread() / VECTORS + i * 32;
      if (ROWS % 32 != 0 && at >= ROWS) continue;
      const int bytes = from[i] == nullptr ? 0 : within;
      // Nothing is read where no bytes exist, but the address must still be a good one.
      const uint8_t* address = bytes > 0 ? from[i] + offset : rows.text != nullptr ? rows.text : rows.image;
      stage_vector<ALIGNED>(to + at * pitch + arch::thread() % VECTORS * 16, address, bytes, rows.width, policy);
    }
  }
};

}  // namespace attanchor
