// What the slots of a sample are: roles given by `roles` or by masks, counts of them, and the slots of given ranks.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace attanchor {

ATTANCHOR_DEVICE bool is_real(int role) { return role >= TEXT && role <= SILENT_IMAGE; }
ATTANCHOR_DEVICE bool is_placeholder(int role) { return role == IMAGE || role == SILENT_IMAGE; }

// PADDING for slots outside the sample.
ATTANCHOR_DEVICE int load_role(const Problem& p, int sample, int slot) {
  if (slot < 0 || slot >= p.rows.slots) return PADDING;
  if (p.rows.merges) return p.roles[static_cast<int64_t>(sample) * p.rows.slots + slot];
  if (slot < p.rows.images) {
    const int64_t at = static_cast<int64_t>(sample) * p.rows.images + slot;
    return p.image_mask == nullptr || p.image_mask[at] ? IMAGE : PADDING;
  }
  const int64_t at = static_cast<int64_t>(sample) * p.texts + (slot - p.rows.images);
  if (p.text_mask != nullptr && !p.text_mask[at]) return PADDING;
  return p.anchor_mask == nullptr || p.anchor_mask[at] ? ANCHOR_TEXT : TEXT;
}

// Whether every slot is real, as is known without looking.
ATTANCHOR_DEVICE bool all_real(const Problem& p) {
  return !p.rows.merges && p.image_mask == nullptr && p.text_mask == nullptr;
}

// Counts over the slots of a sample; images are placeholders of either kind, texts those that are matched.
struct Counts {
  int real_before, images_before, texts_before;  // before slot `first`
  int real, images, texts;
};

ATTANCHOR_RARE Counts count_roles(const Problem& p, int sample, int first, int* scratch) {
  int sums[6] = {};
#pragma unroll 4
  for (int slot = arch::thread(); slot < p.rows.slots; slot += THREADS) {
    const int role = load_role(p, sample, slot);
    const int real = is_real(role), image = is_placeholder(role), text = role == ANCHOR_TEXT;
    const int before = slot < first;
    sums[0] += real & before;
    sums[1] += image & before;
    sums[2] += text & before;
    sums[3] += real;
    sums[4] += image;
    sums[5] += text;
  }
  block_sum(sums, scratch);
  return {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]};
}

// In the build form only those of real slots mean anything.
ATTANCHOR_DEVICE Counts count_slots(const Problem& p, int sample, int first, int* scratch) {
  const int slots = p.rows.slots;
  if (all_real(p)) return {first < slots ? first : slots, 0, 0, slots, 0, 0};
  return count_roles(p, sample, first, scratch);
}

// Real slots up to and with `slot`, counted by a warp.
ATTANCHOR_DEVICE int count_real_through(const Problem& p, int sample, int slot) {
  if (all_real(p)) return slot + 1;
  int count = 0;
  for (int other = arch::lane(); other <= slot; other += 32) count += is_real(load_role(p, sample, other));
  return warp_sum(count);
}

// Bytes of a word that equal `value` (below 128).
ATTANCHOR_DEVICE int count_equal_bytes(uint32_t word, uint32_t value) {
  const uint32_t differs = word ^ (value * 0x01010101u);
  const uint32_t nonzero = ((differs & 0x7f7f7f7fu) + 0x7f7f7f7fu) | differs;
  return 4 - arch::count_bits(nonzero & 0x80808080u);
}

// Merge form: placeholders among the roles `from` … `to` - 1 of the whole batch, in every thread.
ATTANCHOR_RARE int count_placeholders(const uint8_t* roles, int64_t from, int64_t to, int* scratch) {
  int sums[1] = {};
  // Whole 16-byte words where they are aligned, single bytes at both ends.
  const int64_t skew = (16 - static_cast<int64_t>((reinterpret_cast<uintptr_t>(roles) + from) & 15)) & 15;
  const int64_t aligned_from = from + skew < to ? from + skew : to;
  const int64_t words = (to - aligned_from) / 16;
  const int64_t aligned_to = aligned_from + words * 16;
  for (int64_t at = from + arch::thread(); at < aligned_from; at += THREADS) sums[0] += is_placeholder(roles[at]);
  for (int64_t at = aligned_to + arch::thread(); at < to; at += THREADS) sums[0] += is_placeholder(roles[at]);
  const arch::Vector* vectors = reinterpret_cast<const arch::Vector*>(roles + aligned_from);
#pragma unroll 4
  for (int64_t at = arch::thread(); at < words; at += THREADS) {
    const arch::Vector v = vectors[at];
    sums[0] += count_equal_bytes(v.x, IMAGE) + count_equal_bytes(v.x, SILENT_IMAGE);
    sums[0] += count_equal_bytes(v.y, IMAGE) + count_equal_bytes(v.y, SILENT_IMAGE);
    sums[0] += count_equal_bytes(v.z, IMAGE) + count_equal_bytes(v.z, SILENT_IMAGE);
    sums[0] += count_equal_bytes(v.w, IMAGE) + count_equal_bytes(v.w, SILENT_IMAGE);
  }
  block_sum(sums, scratch);
  return sums[0];
}

// Merge form: where a sample's features begin. Blocks meet samples in rising order and count each role once.
struct FeatureBase {
  int sample = 0;
  int base = 0;

  ATTANCHOR_DEVICE int advance(const Problem& p, int to_sample, int* scratch) {
    const int64_t slots = p.rows.slots;
    if (to_sample > sample) base += count_placeholders(p.roles, sample * slots, to_sample * slots, scratch);
    sample = to_sample;
    return base;
  }
};

enum class Kind { image, text, other };  // placeholders, texts that are matched, whatever is no placeholder

ATTANCHOR_DEVICE bool is_of_kind(int role, Kind kind) {
  return kind == Kind::image ? is_placeholder(role) : kind == Kind::text ? role == ANCHOR_TEXT : !is_placeholder(role);
}

// Merge form: slots of the ranks first … first + count - 1 of a kind, -1 where there are fewer; returns how many there
// are in all. `found` lies in shared memory.
ATTANCHOR_RARE int find_slots(const Problem& p, int sample, Kind kind, int first, int count, int* found, int* scratch) {
  for (int at = arch::thread(); at < count; at += THREADS) found[at] = -1;
  const int stretch = ceil_div(p.rows.slots, THREADS);
  const int from = arch::thread() * stretch;
  const int to = from + stretch < p.rows.slots ? from + stretch : p.rows.slots;
  int own = 0;
#pragma unroll 4
  for (int slot = from; slot < to; slot++) own += is_of_kind(load_role(p, sample, slot), kind);
  int total;
  int rank = block_sum_before(own, total, scratch);
  if (rank < first + count && rank + own > first) {
    for (int slot = from; slot < to; slot++) {
      if (!is_of_kind(load_role(p, sample, slot), kind)) continue;
      if (rank >= first && rank < first + count) found[rank - first] = slot;
      rank++;
    }
  }
  arch::sync_block();
  return total;
}

}  // namespace attanchor
