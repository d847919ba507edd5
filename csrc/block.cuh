// Sums over the threads of a block, in an order that is always the same.
#pragma once

#include <arch.cuh>

namespace attanchor {

using arch::word64;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int INT_MOST = 0x7fffffff;

ATTANCHOR_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

ATTANCHOR_DEVICE int warp_sum(int value) {
  ATTANCHOR_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) value += arch::shuffle_xor(value, distance);
  return value;
}

// Sum of `value` over the lanes below this one.
ATTANCHOR_DEVICE int warp_sum_before(int value) {
  int through = value;
  ATTANCHOR_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = arch::shuffle(through, (arch::lane() - distance) & 31);
    if (arch::lane() >= distance) through += below;
  }
  return through - value;
}

// Sums of COUNT values over the block, in every thread. `scratch` holds COUNT * WARPS; safe to call in a row.
template <int COUNT>
ATTANCHOR_DEVICE void block_sum(int (&values)[COUNT], int* scratch) {
  ATTANCHOR_UNROLL
  for (int i = 0; i < COUNT; i++) {
    const int sum = warp_sum(values[i]);
    if (arch::lane() == 0) scratch[i * WARPS + arch::warp()] = sum;
  }
  arch::sync_block();
  ATTANCHOR_UNROLL
  for (int i = 0; i < COUNT; i++) {
    values[i] = 0;
    ATTANCHOR_UNROLL
    for (int w = 0; w < WARPS; w++) values[i] += scratch[i * WARPS + w];
  }
  arch::sync_block();
}

// Sum of `value` over the threads below this one; `total` is the sum over all. `scratch` holds WARPS.
ATTANCHOR_DEVICE int block_sum_before(int value, int& total, int* scratch) {
  const int in_warp = warp_sum_before(value);
  if (arch::lane() == 31) scratch[arch::warp()] = in_warp + value;
  arch::sync_block();
  int before = 0;
  total = 0;
  ATTANCHOR_UNROLL
  for (int w = 0; w < WARPS; w++) {
    if (w < arch::warp()) before += scratch[w];
    total += scratch[w];
  }
  arch::sync_block();
  return before + in_warp;
}

}  // namespace attanchor
