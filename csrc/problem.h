// What the kernels are told: pointers, sizes and options of one call. Plain data, so that it is passed by value.
#pragma once

#include <cstdint>

namespace attanchor {

// Values of `roles`; the build form is given the same ones by its masks. Anything above is padding.
enum Role : int { PADDING = 0, TEXT = 1, IMAGE = 2, ANCHOR_TEXT = 3, SILENT_IMAGE = 4 };

enum class Scalar : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Where the rows of the plain concatenation are. Strides in bytes; the elements of a row lie side by side.
struct Rows {
  const uint8_t* image;  // (B, M, D), in the merge form (T, D)
  const uint8_t* text;   // (B, N, D), in the merge form (B, S, D)
  int64_t image_batch_stride;  // 0 in the merge form
  int64_t image_row_stride;
  int64_t text_batch_stride;
  int64_t text_row_stride;
  int64_t row_bytes;
  int images;    // M; 0 in the merge form
  int features;  // rows of `image` over the whole batch
  int slots;     // S
  int width;     // bytes, a power of two up to 16 that divides row_bytes, every address and every stride
  uint32_t nan;  // two 16-bit NaNs or one 32-bit NaN, for a feature that is not there
  bool merges;
};

// Device memory that is all zero between launches; every launch puts back what it used.
struct State {
  unsigned long long* keys;  // (B, movers): best cosine and host of a mover, 0 = none yet
  unsigned long long* cuts;  // (B,): smallest rank key within the budget
  unsigned* ticket;          // next work item
  unsigned* counters;        // (B, COUNTER_STRIDE): finished match items of a sample, and readers done with its keys
};
constexpr int COUNTER_STRIDE = 32;  // a cache line for the counters of a sample, and one for the ticket

// What there is where image tokens are dropped; `priority`, `best` and `survivors` are zero between launches, as State.
struct Drop {
  float* relevance;          // (B, M), in the merge form (B, S)
  const float* salience;     // (B, M), in the merge form (T,), or null: their relevance
  const int32_t* cells;      // (B, M), in the merge form (T,), or null; others than those below M or S are none
  const int32_t* keep_each;  // (B,), or null: `keep`
  unsigned long long* priority;   // (B, S)
  unsigned long long* best;       // (B, M), in the merge form (B, S): of each cell; only with `cells`
  unsigned long long* survivors;  // (B, words)
  int words;                      // S / 32 + 1: one more than slots fill, so that there is one behind the last slot
  int keep;
  bool drops;
};

#ifdef ATTANCHOR_STAMPS
// Where blocks note when they reach which phase of which of their items (stamps.cuh).
struct StampRows {
  unsigned long long* times;  // (blocks, items, phases)
  int blocks, items;
};
#endif

struct Problem {
  Rows rows;
  State state;

  const uint8_t* roles;         // (B, S), or null: the build form
  const int32_t* turn;          // (B, S) or null
  const uint8_t* image_mask;    // (B, M) or null
  const uint8_t* text_mask;     // (B, N) or null
  const uint8_t* anchor_mask;   // (B, N) or null
  const int64_t* position_ids;  // (P, B, S) or null

  uint8_t* embeds;  // (B, C, D), or null: the plan alone
  int64_t* new_position_ids;  // (P, B, C)
  int64_t* attention_mask;    // (B, C)
  int64_t* source;            // (B, C)
  uint8_t* is_anchor;         // (B, C)
  int64_t* host;              // (B, movers)
  float* score;               // (B, movers)
  int32_t* places;            // (B, 3, S)

  int batch;
  int texts;   // N; S in the merge form
  int movers;  // keys of a sample: N or M; S in the merge form
  int capacity;
  int axes;  // P
  int budget;
  float tau;
  bool image_into_text;
  bool budgeted;
  bool inherit;
  bool pad_left;

  int match_tiles;     // of a sample
  int assemble_tiles;  // of a sample
  int tile_rows;       // slots of an assemble tile, at most 32
  int lag;             // samples between match and assemble
  int held_pitch;      // bytes from one held row to the next
  bool bulk;           // tiles that are kept on chip come and go by bulk copies

  const float* tau_on_device;  // in place of tau, or null
  Drop drop;
#ifdef ATTANCHOR_STAMPS
  StampRows stamps;
#endif
};

// The copy alone, and its transpose.
struct Copy {
  Rows rows;              // assemble: the inputs; backward: the gradients of the inputs, to be written
  const int64_t* source;  // (B, L); assemble
  const int32_t* places;  // (B, 3, S)
  uint8_t* sequence;      // (B, L, D): assemble writes it, backward reads it
  int64_t sequence_batch_stride;
  int64_t sequence_row_stride;
  int batch;
  int texts;
  int length;  // L
  int tiles;   // of a sample
  int tile_rows;
  int tail;  // backward: work items that clear the features which no placeholder takes
};

// What a caller may fix instead of leaving it to the shape; tests and tuning use it. What there is not is an error.
struct Tuning {
  int tile_images = 0;  // image rows of a match tile, 0 = by shape
  int cluster = 0;      // programs that share a match tile's columns, 0 = by shape
  int tile_rows = 0;
  int lag = -1;
  int blocks = 0;  // most that run at once, 0 = what the device runs
  int hold = -1;   // 1: only kernels that keep their tile on chip, 0: none of them, -1: by shape
  int bulk = -1;   // 0: those move it without bulk copies
};

// How a construct launch was cut into tiles, and what the device was found to run at once.
struct Launched {
  int tile_images, cluster;
  bool holds, bulk;
  int tile_rows, lag;  // 0 where the tile is kept on chip
  int blocks, resident;
  int shared_bytes;
};

#ifdef ATTANCHOR_STAMPS
extern StampRows stamp_rows;  // of the launches to come; no blocks: nowhere
#endif

// Launch on `stream` of the current device. Null, or what went wrong.
const char* launch_construct(Problem problem, Scalar scalar, Tuning tuning, Launched& launched, void* stream);
const char* launch_assemble(Copy copy, void* stream);
const char* launch_backward(Copy copy, Scalar scalar, void* stream);

}  // namespace attanchor
