// Copying rows: one warp a row, several loads under way before the first store.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace attanchor {

// What an output row is made of when it is no copy.
enum class Filling { none, zero, nan };

struct RowJob {
  const uint8_t* from;
  uint8_t* to[2];  // null: not this one
  Filling filling;
};

template <class V>
ATTANCHOR_DEVICE V filled(uint32_t word) {
  if constexpr (sizeof(V) == 16) {
    return V{word, word, word, word};
  } else if constexpr (sizeof(V) == 8) {
    return static_cast<V>(static_cast<uint64_t>(word) << 32 | word);
  } else {
    return static_cast<V>(word);
  }
}

template <class V>
ATTANCHOR_DEVICE void run_row(const RowJob& job, int64_t row_bytes, uint32_t nan) {
  constexpr int AHEAD = 8;
  const arch::Policy once = arch::drop_from_l2();
  const int64_t count = row_bytes / static_cast<int64_t>(sizeof(V));
  const V* from = reinterpret_cast<const V*>(job.from);
  V* first = reinterpret_cast<V*>(job.to[0]);
  V* second = reinterpret_cast<V*>(job.to[1]);
  const V filling = filled<V>(job.filling == Filling::nan ? nan : 0);
  for (int64_t start = arch::lane(); start < count; start += 32 * AHEAD) {
    V held[AHEAD];
    ATTANCHOR_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      held[i] = filling;
      if (job.filling != Filling::none || start + i * 32 >= count) continue;
      held[i] = arch::load_stream(from + start + i * 32, once);
    }
    ATTANCHOR_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      if (start + i * 32 >= count) continue;
      if (first != nullptr) arch::store_stream(first + start + i * 32, held[i]);
      if (second != nullptr) arch::store_stream(second + start + i * 32, held[i]);
    }
  }
}

// By a warp. `width` divides every address and row_bytes.
ATTANCHOR_DEVICE void run_row_job(const RowJob& job, const Rows& rows) {
  if (job.to[0] == nullptr && job.to[1] == nullptr) return;
  if (rows.width == 16) {
    run_row<arch::Vector>(job, rows.row_bytes, rows.nan);
  } else if (rows.width == 8) {
    run_row<unsigned long long>(job, rows.row_bytes, rows.nan);
  } else if (rows.width == 4) {
    run_row<uint32_t>(job, rows.row_bytes, rows.nan);
  } else {
    run_row<uint16_t>(job, rows.row_bytes, rows.nan);
  }
}

// The row that a slot holds; `feature` is -1 for a text.
ATTANCHOR_DEVICE const uint8_t* slot_row(const Rows& rows, int sample, int slot, int feature) {
  if (feature < 0) {
    return rows.text + sample * rows.text_batch_stride + (slot - rows.images) * rows.text_row_stride;
  }
  const int64_t row = rows.merges ? feature : slot;
  return rows.image + sample * rows.image_batch_stride + row * rows.image_row_stride;
}

}  // namespace attanchor
