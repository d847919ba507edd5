// The copy alone, from a finished plan, and its transpose: for every input row the gradients of its one or two copies.
#include "copy.cuh"

namespace attanchor {
namespace {

struct Tile {
  int sample, index;
  ATTANCHOR_DEVICE Tile(const Copy& c) : sample(arch::block() / c.tiles), index(arch::block() % c.tiles) {}
};

// An entry of `places`: 0 the original's row, 1 the copy's, 2 the feature.
ATTANCHOR_DEVICE int place_of(const Copy& c, int sample, int which, int slot) {
  return c.places[(static_cast<int64_t>(sample) * 3 + which) * c.rows.slots + slot];
}

// Row `place` of the sequence; null for a place that it does not have.
ATTANCHOR_DEVICE uint8_t* sequence_row(const Copy& c, int sample, int place) {
  if (place < 0 || place >= c.length) return nullptr;
  return c.sequence + sample * c.sequence_batch_stride + place * c.sequence_row_stride;
}

ATTANCHOR_KERNEL(THREADS, 4) assemble_kernel(ATTANCHOR_ARGUMENT(Copy) c) {
  const Tile tile(c);
  for (int row = arch::warp(); row < c.tile_rows; row += WARPS) {
    const int at = tile.index * c.tile_rows + row;  // a slot, and a row of the sequence that may be padding
    if (at < c.rows.slots) {
      const int feature = place_of(c, tile.sample, 2, at);
      const bool missing = feature >= c.rows.features;
      RowJob job = {nullptr, {}, missing ? Filling::nan : Filling::none};
      if (!missing) job.from = slot_row(c.rows, tile.sample, at, feature);
      job.to[0] = sequence_row(c, tile.sample, place_of(c, tile.sample, 0, at));
      job.to[1] = sequence_row(c, tile.sample, place_of(c, tile.sample, 1, at));
      run_row_job(job, c.rows);
    }
    if (at < c.length && c.source[static_cast<int64_t>(tile.sample) * c.length + at] < 0) {
      run_row_job({nullptr, {sequence_row(c, tile.sample, at), nullptr}, Filling::zero}, c.rows);
    }
  }
}

// The sum of the elements of two words, rounded once.
template <class E, class V>
ATTANCHOR_DEVICE V add_elements(V a, V b) {
  constexpr int COUNT = sizeof(V) / sizeof(E);
  union {
    V word;
    E element[COUNT];
  } x{a}, y{b};
  ATTANCHOR_UNROLL
  for (int i = 0; i < COUNT; i++) {
    x.element[i] = arch::narrow<E>(arch::widen(x.element[i]) + arch::widen(y.element[i]));
  }
  return x.word;
}

// to = original + copy, either of which may be missing; by a warp.
template <class E, class V>
ATTANCHOR_DEVICE void gather_row(uint8_t* to, const uint8_t* original, const uint8_t* copy, int64_t row_bytes) {
  constexpr int AHEAD = 4;
  const arch::Policy once = arch::drop_from_l2();
  const int64_t count = row_bytes / static_cast<int64_t>(sizeof(V));
  for (int64_t start = arch::lane(); start < count; start += 32 * AHEAD) {
    V one[AHEAD], other[AHEAD];
    ATTANCHOR_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      const int64_t at = start + i * 32;
      one[i] = other[i] = filled<V>(0);
      if (at >= count) continue;
      if (original != nullptr) one[i] = arch::load_stream(reinterpret_cast<const V*>(original) + at, once);
      if (copy != nullptr) other[i] = arch::load_stream(reinterpret_cast<const V*>(copy) + at, once);
    }
    ATTANCHOR_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      const V sum = copy == nullptr ? one[i] : original == nullptr ? other[i] : add_elements<E>(one[i], other[i]);
      if (start + i * 32 < count) arch::store_stream(reinterpret_cast<V*>(to) + start + i * 32, sum);
    }
  }
}

template <class E>
ATTANCHOR_DEVICE void gather(const Rows& rows, uint8_t* to, const uint8_t* original, const uint8_t* copy) {
  if (rows.width == 16) {
    gather_row<E, arch::Vector>(to, original, copy, rows.row_bytes);
  } else if (rows.width == 8) {
    gather_row<E, unsigned long long>(to, original, copy, rows.row_bytes);
  } else if (rows.width == 4) {
    gather_row<E, uint32_t>(to, original, copy, rows.row_bytes);
  } else if constexpr (sizeof(E) == 2) {
    gather_row<E, uint16_t>(to, original, copy, rows.row_bytes);
  }
}

// The features of the batch that some placeholder takes: one more than the last of them.
ATTANCHOR_DEVICE int count_taken(const Copy& c) {
  const int64_t slots = c.rows.slots;
  for (int64_t end = c.batch * slots; end > 0; end -= 32) {
    const int64_t at = end - 1 - arch::lane();
    const int feature = at < 0 ? -1 : place_of(c, at / slots, 2, at % slots);
    const uint32_t taken = arch::ballot(feature >= 0);
    // Features rise with the slots, so the first lane that has one has the last of all.
    if (taken != 0) return arch::shuffle(feature, arch::count_bits(~taken & (taken - 1))) + 1;
  }
  return 0;
}

template <class E>
ATTANCHOR_KERNEL(THREADS, 3) backward_kernel(ATTANCHOR_ARGUMENT(Copy) c) {
  const int tiles = c.batch * c.tiles;
  if (arch::block() >= tiles) {
    // Features beyond the last placeholder.
    const int64_t step = static_cast<int64_t>(c.tail) * WARPS;
    const int64_t first = static_cast<int64_t>(arch::block() - tiles) * WARPS + arch::warp();
    for (int64_t row = count_taken(c) + first; row < c.rows.features; row += step) {
      uint8_t* to = const_cast<uint8_t*>(c.rows.image) + row * c.rows.image_row_stride;
      gather<E>(c.rows, to, nullptr, nullptr);
    }
    return;
  }
  const Tile tile(c);
  for (int row = arch::warp(); row < c.tile_rows; row += WARPS) {
    const int slot = tile.index * c.tile_rows + row;
    if (slot >= c.rows.slots) continue;
    const int feature = place_of(c, tile.sample, 2, slot);
    const uint8_t* original = sequence_row(c, tile.sample, place_of(c, tile.sample, 0, slot));
    const uint8_t* copy = sequence_row(c, tile.sample, place_of(c, tile.sample, 1, slot));
    const bool wanted = feature < 0 ? c.rows.text != nullptr : c.rows.image != nullptr && feature < c.rows.features;
    if (wanted) {
      gather<E>(c.rows, const_cast<uint8_t*>(slot_row(c.rows, tile.sample, slot, feature)), original, copy);
    }
    if (feature >= 0 && c.rows.merges && c.rows.text != nullptr) {
      // What the prompt's embedding holds at a placeholder is not used.
      gather<E>(c.rows, const_cast<uint8_t*>(slot_row(c.rows, tile.sample, slot, -1)), nullptr, nullptr);
    }
  }
}

constexpr int ROWS_A_TILE = 16;

}  // namespace

const char* launch_assemble(Copy copy, void* stream) {
  const int rows = copy.rows.slots > copy.length ? copy.rows.slots : copy.length;
  if (copy.batch == 0 || copy.length == 0) return nullptr;
  copy.tile_rows = ROWS_A_TILE;
  copy.tiles = (rows + ROWS_A_TILE - 1) / ROWS_A_TILE;
  return arch::launch(assemble_kernel, copy.batch * copy.tiles, THREADS, 0, 1, stream, copy);
}

const char* launch_backward(Copy copy, Scalar scalar, void* stream) {
  copy.tile_rows = ROWS_A_TILE;
  copy.tiles = (copy.rows.slots + ROWS_A_TILE - 1) / ROWS_A_TILE;
  copy.tail = copy.rows.merges && copy.rows.image != nullptr ? 64 : 0;
  const int blocks = copy.batch * copy.tiles + copy.tail;
  if (blocks == 0) return nullptr;
  const auto kernel = scalar == Scalar::float32   ? backward_kernel<float>
                      : scalar == Scalar::float16 ? backward_kernel<arch::Half>
                                                  : backward_kernel<arch::BFloat>;
  return arch::launch(kernel, blocks, THREADS, 0, 1, stream, copy);
}

}  // namespace attanchor
