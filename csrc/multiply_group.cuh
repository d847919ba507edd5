// The products of multiply.cuh by warpgroup instructions (wgmma), sm_90a alone: the same warps take the same sums in the
// same slices. A warpgroup reads 32 texts from shared memory once for its four warps; with mma.sync every warp loads
// them for itself, which is most of what the kernel asks of shared memory.
#pragma once

#include "multiply.cuh"

namespace attanchor {

template <class E>
struct GroupMultiplier : Multiplier<E, 64> {
  using Base = Multiplier<E, 64>;
  static constexpr int STEPS = Base::STEPS;
  static constexpr bool SWIZZLES = true;
  static constexpr int TEXT_PITCH = CHUNK_BYTES;
  static_assert(Base::PARTS == 1 && Base::SQUARES == 1, "a warpgroup has 64 images, 32 texts and all columns");

  // A chunk of the image rows, `pitch` bytes apart, and of the swizzled text rows.
  ATTANCHOR_DEVICE void multiply(const uint8_t* images, int pitch, const uint8_t* texts) {
    const int lane = arch::lane(), group = this->text_warp;
    const uint8_t* image = images + (this->row_warp * 16 + lane % 16) * pitch + lane / 16 * 16;
    uint32_t a[STEPS][4];
    ATTANCHOR_UNROLL
    for (int step = 0; step < STEPS; step++) {
      arch::load_matrices(a[step], image + step * 32);
      // Images times themselves before all: once the warpgroup multiplies, nobody may read its registers.
      const uint32_t b0 = group == 0 ? a[step][0] : a[step][1], b1 = group == 0 ? a[step][2] : a[step][3];
      arch::multiply_matrices<E>(this->image_slice, a[step][0], a[step][1], a[step][2], a[step][3], b0, b1);
    }
    const arch::word64 described = arch::describe_swizzled(texts + group * 32 * TEXT_PITCH);
    arch::begin_groups();
    ATTANCHOR_UNROLL
    for (int step = 0; step < STEPS; step++) arch::multiply_group<E>(this->slice, a[step], described + step * 32 / 16);
    arch::commit_groups();
    // Meanwhile eight texts times themselves, two steps at a time.
    const int text = group * 32 + this->row_warp * 8 + lane % 8;
    ATTANCHOR_UNROLL
    for (int step = 0; step < STEPS; step += 2) {
      uint32_t b[4];
      arch::load_matrices(b, texts + text * TEXT_PITCH + ((step * 2 + lane / 8) ^ (text % 8)) * 16);
      arch::multiply_matrices<E>(this->text_slice[0], b[0], b[0], b[1], b[1], b[0], b[1]);
      arch::multiply_matrices<E>(this->text_slice[0], b[2], b[2], b[3], b[3], b[2], b[3]);
    }
    arch::wait_groups(this->slice);
  }
};

}  // namespace attanchor
