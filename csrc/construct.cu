// Which variant of the construct kernel a call gets, how its work is cut into tiles, and the launch.
//
// The rules are estimates until they have been measured.
#include "construct_held.cuh"

namespace attanchor {

#ifdef ATTANCHOR_STAMPS
StampRows stamp_rows = {};
#endif

namespace {

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The image rows that a sample may have.
int most_images(const Rows& rows) {
  if (!rows.merges) return rows.images;
  return rows.features < rows.slots ? rows.features : rows.slots;
}

// Blocks in a cluster: as many as leave each at least six chunks of columns, four where the device would not fill.
int wanted_cluster(const Problem& p) {
  constexpr int FEW_BLOCKS = 128;
  const int64_t chunks = (p.rows.row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
  const bool few = static_cast<int64_t>(p.batch) * divide_up(most_images(p.rows), 32) * 4 < FEW_BLOCKS;
  return chunks >= (few ? 32 : 48) ? 8 : chunks >= 16 ? 4 : 1;
}

struct Choice {
  const Variant* variant = nullptr;
  int shared_bytes = 0;
  int resident = 0;  // blocks
  const char* error = nullptr;
};

// Of the variants with this cluster, large tiles where they keep every multiprocessor busy, small ones otherwise.
Choice choose(const Variants& variants, int cluster, const Problem& p, const Tuning& tuning) {
  Choice best;
  for (int i = 0; i < variants.count; i++) {
    const Variant& v = variants.list[i];
    const int tiles = divide_up(most_images(p.rows), v.images);
    if (v.cluster != cluster || (tuning.tile_images && v.images != tuning.tile_images)) continue;
    const int64_t pitch = v.holds ? held_pitch(p.rows.row_bytes, cluster) : 0;
    if (v.holds && (tiles > MOST_HELD_TILES || pitch > MOST_STRETCHES * STRETCH_BYTES)) continue;
    const int shared = v.shared_bytes + static_cast<int>(pitch) * v.images;
    int resident = 0;
    best.error = arch::count_resident(v.kernel, THREADS, shared, cluster, resident);
    if (best.error != nullptr) return best;
    if (resident == 0) continue;
    const bool busy = static_cast<int64_t>(p.batch) * tiles * cluster >= resident;
    if (best.variant == nullptr || (busy && v.images > best.variant->images)) best = {&v, shared, resident, nullptr};
  }
  return best;
}

Variants held_variants(Scalar scalar) {
  if (scalar == Scalar::float32) return held_float_variants();
  return scalar == Scalar::float16 ? held_half_variants() : held_bfloat_variants();
}

Variants drop_variants(Scalar scalar) {
  if (scalar == Scalar::float32) return drop_float_variants();
  return scalar == Scalar::float16 ? drop_half_variants() : drop_bfloat_variants();
}

Variants plain_variants(Scalar scalar) {
  if (scalar == Scalar::float32) return float_variants();
  return scalar == Scalar::float16 ? half_variants() : bfloat_variants();
}

bool may_hold(const Problem& p, const Tuning& tuning) {
  return tuning.hold != 0 && p.rows.width == 16 && p.embeds != nullptr && !p.drop.drops;
}

// Clusters that hold their tile where the device has them and a tile fits; otherwise rows are read again through L2.
Choice choose(const Problem& p, Scalar scalar, const Tuning& tuning) {
  const int wanted = wanted_cluster(p);
  for (const bool hold : {true, false}) {
    if (hold ? !may_hold(p, tuning) : tuning.hold == 1) continue;
    for (const int cluster : {8, 4, 1}) {
      if (tuning.cluster ? cluster != tuning.cluster : cluster > wanted) continue;
      const Variants variants = hold           ? held_variants(scalar)
                                : p.drop.drops ? drop_variants(scalar)
                                               : plain_variants(scalar);
      const Choice choice = choose(variants, cluster, p, tuning);
      if (choice.variant != nullptr || choice.error != nullptr) return choice;
    }
  }
  return {};
}

int choose_tile_rows(const Problem& p, int resident) {
  for (int rows = TILE_ROWS; rows > 8; rows /= 2) {
    if (static_cast<int64_t>(p.batch) * divide_up(p.capacity, rows) >= resident) return rows;
  }
  return 8;
}

}  // namespace

const char* launch_construct(Problem p, Scalar scalar, Tuning tuning, Launched& launched, void* stream) {
  Choice choice = choose(p, scalar, tuning);
  if (choice.error != nullptr) return choice.error;
  if (choice.variant == nullptr) {
    if (tuning.hold == 1 && !may_hold(p, tuning)) {
      return "hold is 1; tiles are kept on chip only where rows are copied, begin and end at multiples of 16 bytes, and "
             "none are dropped";
    }
    return "no construct kernel that was asked for runs on this device; rebuild attanchor_kernels with "
           "ATTANCHOR_CUDA_ARCHS naming its compute capability";
  }
  const Variant& v = *choice.variant;
  if (tuning.blocks > 0 && tuning.blocks < choice.resident) {  // any grid will do
    choice.resident = divide_up(tuning.blocks, v.cluster) * v.cluster;
  }
  const int images = most_images(p.rows), clusters = choice.resident / v.cluster;
  p.match_tiles = images > v.images ? divide_up(images, v.images) : 1;
  p.tile_rows = tuning.tile_rows ? tuning.tile_rows : choose_tile_rows(p, choice.resident);
  const int most_rows = p.capacity > p.rows.slots ? p.capacity : p.rows.slots;  // dropping may leave less room
  p.assemble_tiles = v.holds ? 0 : divide_up(most_rows, p.tile_rows);
  // So many samples between match and assemble as are matched at once: nobody waits, and little leaves the L2 cache.
  const int lag = tuning.lag >= 0 ? tuning.lag : divide_up(clusters, p.match_tiles);
  p.held_pitch = static_cast<int>(held_pitch(p.rows.row_bytes, v.cluster));
  p.bulk = v.holds && tuning.bulk != 0;
#ifdef ATTANCHOR_STAMPS
  p.stamps = stamp_rows;
#endif
  p.lag = lag < 1 ? 1 : lag > p.batch ? p.batch : lag;
  const int64_t items = static_cast<int64_t>(p.batch) * (p.match_tiles + divide_up(p.assemble_tiles, v.cluster));
  const int blocks = static_cast<int>(items < clusters ? items : clusters) * v.cluster;
  launched = {v.images, v.cluster, v.holds, p.bulk, v.holds ? 0 : p.tile_rows, v.holds ? 0 : p.lag,
              blocks, choice.resident, choice.shared_bytes};
  return arch::launch(v.kernel, blocks, THREADS, choice.shared_bytes, v.cluster, stream, p);
}

}  // namespace attanchor
