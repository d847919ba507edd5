// Products of a tile of image rows with a block of text rows, and the squared norms of both, chunk by chunk.
//
// Sums run in slices of the columns, each with fresh accumulators, added in order: that bounds the error of tensor
// cores, which truncate, at any D. Every row's sums are taken in the same order wherever it lies in the tile, so that
// bit-identical rows get identical sums.
#pragma once

#include "stage.cuh"

namespace attanchor {

constexpr int TEXTS = 64;         // text rows of a block
constexpr int SLICE_CHUNKS = 16;  // chunks summed in one accumulator

// What the warps leave in shared memory: PARTS sums over disjoint columns.
template <int IMAGES, int PARTS>
struct Partial {
  float product[PARTS][IMAGES][TEXTS + 1];
  float image_square[PARTS][IMAGES];
  float text_square[PARTS][TEXTS];
};

// The room for sums that are still to be added up: none where there is but one.
template <int IMAGES, int PARTS>
struct Parts : Partial<IMAGES, PARTS> {};
template <int IMAGES>
struct Parts<IMAGES, 1> {};

// 16-bit elements on tensor cores. Warps split the images by 16, the texts by 32, and the columns of a chunk PARTS
// ways. The squared norms are the diagonals of rows times themselves: the fragments are already there.
template <class E, int IMAGES>
struct Multiplier {
  static constexpr int ROW_WARPS = IMAGES / 16;
  static constexpr int PARTS = WARPS / (2 * ROW_WARPS);
  static constexpr int STEPS = CHUNK_BYTES / 32 / PARTS;
  static constexpr int SQUARES = 4 / ROW_WARPS;  // 8-text tiles whose norms a warp takes

  float sum[4][4], slice[4][4];
  float image_sum, image_slice[4];
  float text_sum[SQUARES], text_slice[SQUARES][4];
  int row_warp, text_warp, part;

  ATTANCHOR_DEVICE Multiplier() {
    row_warp = arch::warp() % ROW_WARPS;
    text_warp = arch::warp() / ROW_WARPS % 2;
    part = arch::warp() / ROW_WARPS / 2;
    ATTANCHOR_UNROLL
    for (int i = 0; i < 16; i++) sum[i / 4][i % 4] = slice[i / 4][i % 4] = 0;
    image_sum = 0;
    ATTANCHOR_UNROLL
    for (int i = 0; i < 4; i++) image_slice[i] = 0;
    ATTANCHOR_UNROLL
    for (int j = 0; j < SQUARES; j++) {
      text_sum[j] = 0;
      ATTANCHOR_UNROLL
      for (int i = 0; i < 4; i++) text_slice[j][i] = 0;
    }
  }

  // A chunk of the image rows, `pitch` bytes apart, and of the text rows, PITCH bytes apart.
  ATTANCHOR_DEVICE void multiply(const uint8_t* images, int pitch, const uint8_t* texts) {
    const int lane = arch::lane();
    const uint8_t* image = images + (row_warp * 16 + lane % 16) * pitch + lane / 16 * 16;
    const uint8_t* text = texts + (text_warp * 32 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
    ATTANCHOR_UNROLL
    for (int step = 0; step < STEPS; step++) {
      const int column = (step * PARTS + part) * 32;
      uint32_t a[4];
      arch::load_matrices(a, image + column);
      // Rows times themselves: this warp takes the upper or the lower eight of its sixteen.
      const uint32_t b0 = text_warp == 0 ? a[0] : a[1], b1 = text_warp == 0 ? a[2] : a[3];
      arch::multiply_matrices<E>(image_slice, a[0], a[1], a[2], a[3], b0, b1);
      ATTANCHOR_UNROLL
      for (int pair = 0; pair < 2; pair++) {
        uint32_t b[4];
        arch::load_matrices(b, text + pair * 16 * PITCH + column);
        ATTANCHOR_UNROLL
        for (int half = 0; half < 2; half++) {
          const int tile = pair * 2 + half;
          const uint32_t c0 = b[half * 2], c1 = b[half * 2 + 1];
          arch::multiply_matrices<E>(slice[tile], a[0], a[1], a[2], a[3], c0, c1);
          if (tile % ROW_WARPS == row_warp) {
            arch::multiply_matrices<E>(text_slice[tile / ROW_WARPS], c0, c0, c1, c1, c0, c1);
          }
        }
      }
    }
  }

  ATTANCHOR_DEVICE void end_slice() {
    ATTANCHOR_UNROLL
    for (int i = 0; i < 16; i++) {
      sum[i / 4][i % 4] += slice[i / 4][i % 4];
      slice[i / 4][i % 4] = 0;
    }
    // Lane 4 g + t holds columns 2 t and 2 t + 1 of row g: the diagonal is where one of them is g.
    const bool odd = arch::lane() / 4 % 2;
    const float upper = odd ? image_slice[1] : image_slice[0], lower = odd ? image_slice[3] : image_slice[2];
    image_sum += text_warp == 0 ? upper : lower;
    ATTANCHOR_UNROLL
    for (int j = 0; j < SQUARES; j++) text_sum[j] += odd ? text_slice[j][1] : text_slice[j][0];
    ATTANCHOR_UNROLL
    for (int i = 0; i < 4; i++) {
      image_slice[i] = 0;
      ATTANCHOR_UNROLL
      for (int j = 0; j < SQUARES; j++) text_slice[j][i] = 0;
    }
  }

  ATTANCHOR_DEVICE void store(Partial<IMAGES, PARTS>& partial) const {
    const int g = arch::lane() / 4, t = arch::lane() % 4;
    ATTANCHOR_UNROLL
    for (int tile = 0; tile < 4; tile++) {
      const int text = text_warp * 32 + tile * 8 + t * 2;
      partial.product[part][row_warp * 16 + g][text] = sum[tile][0];
      partial.product[part][row_warp * 16 + g][text + 1] = sum[tile][1];
      partial.product[part][row_warp * 16 + g + 8][text] = sum[tile][2];
      partial.product[part][row_warp * 16 + g + 8][text + 1] = sum[tile][3];
    }
    if (t != g / 2) return;
    partial.image_square[part][row_warp * 16 + text_warp * 8 + g] = image_sum;
    ATTANCHOR_UNROLL
    for (int j = 0; j < SQUARES; j++) {
      partial.text_square[part][text_warp * 32 + (j * ROW_WARPS + row_warp) * 8 + g] = text_sum[j];
    }
  }
};

// float32 without tensor cores: a thread takes IMAGES / 16 images times 4 texts.
template <int IMAGES>
struct Multiplier<float, IMAGES> {
  static constexpr int PARTS = 1;
  static constexpr int EACH = IMAGES / 16;
  static_assert(IMAGES + TEXTS <= THREADS, "one thread a row for the norms");

  float sum[EACH][4], slice[EACH][4], square_sum, square_slice;

  ATTANCHOR_DEVICE Multiplier() {
    square_sum = square_slice = 0;
    ATTANCHOR_UNROLL
    for (int i = 0; i < EACH * 4; i++) sum[i / 4][i % 4] = slice[i / 4][i % 4] = 0;
  }

  static ATTANCHOR_DEVICE float dot(const arch::Vector& a, const arch::Vector& b, float sum) {
    sum = arch::multiply_add(arch::bits_float(a.x), arch::bits_float(b.x), sum);
    sum = arch::multiply_add(arch::bits_float(a.y), arch::bits_float(b.y), sum);
    sum = arch::multiply_add(arch::bits_float(a.z), arch::bits_float(b.z), sum);
    return arch::multiply_add(arch::bits_float(a.w), arch::bits_float(b.w), sum);
  }

  ATTANCHOR_DEVICE void multiply(const uint8_t* images, int pitch, const uint8_t* texts) {
    const uint8_t* image = images + arch::thread() / 16 * pitch;
    const uint8_t* text = texts + arch::thread() % 16 * PITCH;
#pragma unroll 2
    for (int at = 0; at < CHUNK_BYTES; at += 16) {
      arch::Vector b[4];
      ATTANCHOR_UNROLL
      for (int j = 0; j < 4; j++) b[j] = *reinterpret_cast<const arch::Vector*>(text + j * 16 * PITCH + at);
      ATTANCHOR_UNROLL
      for (int i = 0; i < EACH; i++) {
        const arch::Vector a = *reinterpret_cast<const arch::Vector*>(image + i * 16 * pitch + at);
        ATTANCHOR_UNROLL
        for (int j = 0; j < 4; j++) slice[i][j] = dot(a, b[j], slice[i][j]);
      }
    }
    const int row = arch::thread();
    if (row >= IMAGES + TEXTS) return;
    const uint8_t* own = row < IMAGES ? images + row * pitch : texts + (row - IMAGES) * PITCH;
    for (int at = 0; at < CHUNK_BYTES; at += 16) {
      const arch::Vector v = *reinterpret_cast<const arch::Vector*>(own + at);
      square_slice = dot(v, v, square_slice);
    }
  }

  ATTANCHOR_DEVICE void end_slice() {
    ATTANCHOR_UNROLL
    for (int i = 0; i < EACH * 4; i++) {
      sum[i / 4][i % 4] += slice[i / 4][i % 4];
      slice[i / 4][i % 4] = 0;
    }
    square_sum += square_slice;
    square_slice = 0;
  }

  ATTANCHOR_DEVICE void store(Partial<IMAGES, PARTS>& partial) const {
    ATTANCHOR_UNROLL
    for (int i = 0; i < EACH; i++) {
      ATTANCHOR_UNROLL
      for (int j = 0; j < 4; j++) {
        partial.product[0][arch::thread() / 16 + i * 16][arch::thread() % 16 + j * 16] = sum[i][j];
      }
    }
    const int row = arch::thread();
    if (row < IMAGES) {
      partial.image_square[0][row] = square_sum;
    } else if (row < IMAGES + TEXTS) {
      partial.text_square[0][row - IMAGES] = square_sum;
    }
  }
};

}  // namespace attanchor
