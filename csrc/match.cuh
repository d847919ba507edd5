// Match: a tile of image rows against all texts of its sample, one 64-bit maximum per mover.
//
// Image rows are the tile and texts the inner loop in both directions; only the axis of the reduction differs. The
// blocks of a cluster share a tile: each takes a range of its columns, so that the texts are read once a cluster; they
// add up their products through each other's shared memory, each for some of the rows.
//
// With DROPS the best cosine of every image row is kept too: its relevance.
//
// With HELD a block keeps its columns of the image rows in shared memory (held_rows.cuh), to copy them out from
// there (held_tile.cuh).
#pragma once

#include <type_traits>

#include "held_rows.cuh"
#include "keys.cuh"
#include "multiply.cuh"
#include "slots.cuh"
#include "stamps.cuh"

namespace attanchor {

template <class E, int IMAGES_, int CLUSTER_, bool HELD, bool DROPS = false>
struct MatchTile {
  using Product = Multiplier<E, IMAGES_>;
  static constexpr int IMAGES = IMAGES_;
  static constexpr int CLUSTER = CLUSTER_;
  static constexpr int ROWS = IMAGES + TEXTS;
  static constexpr int OWN = IMAGES / CLUSTER;  // image rows whose products a block adds up and publishes
  static constexpr int PARTS = Product::PARTS;
  static_assert(OWN * CLUSTER == IMAGES && OWN >= 4, "every block of a cluster publishes some rows");

  struct SharedAlways {
    union {
      uint8_t stages[STAGES][(HELD ? TEXTS : ROWS) * PITCH];
      struct {
        Partial<IMAGES, 1> sum;         // this block's columns; the other blocks of the cluster read it
        Parts<IMAGES, PARTS> partial;   // the warps' columns
        float product[OWN][TEXTS + 1];  // all columns, this block's rows
      };
    };
    float scale[OWN + TEXTS];       // reciprocal norms, negative: takes no part
    word64 best[THREADS];
    const uint8_t* row[ROWS];  // null: not loaded
    bool kept[ROWS];           // takes part in matching
    int index[ROWS];           // as keys count it: a mover's among its kind, a host's as it is reported
    int slot[ROWS];
    int scratch[WARPS + 2];
    unsigned arrived;
  };
  struct SharedWithRelevance : SharedAlways {
    float relevance[OWN];  // best cosine of this block's image rows so far
  };
  using Shared = std::conditional_t<DROPS, SharedWithRelevance, SharedAlways>;

  const Problem& p;
  Shared& s;
  int rank;  // in the cluster
  int sample;
  HeldRows<IMAGES>* held;  // with HELD

  ATTANCHOR_DEVICE MatchTile(const Problem& problem, Shared& shared, int in_cluster, int of_sample,
                             HeldRows<IMAGES>* rows = nullptr)
      : p(problem), s(shared), rank(in_cluster), sample(of_sample), held(rows) {}

  // Returns the number of movers of the sample. Never waits for work of another cluster. `meanwhile` is called once, with
  // the first copies on their way.
  template <class Meanwhile>
  ATTANCHOR_DEVICE int run(int tile, int feature_base, const Stamps& stamps, const Meanwhile& meanwhile) {
    const bool merges = p.rows.merges;
    const int first = tile * IMAGES;
    int images = p.rows.images, texts = p.texts;
    if (merges) images = find_slots(p, sample, Kind::image, first, IMAGES, s.slot, s.scratch);
    const bool some = find_images(first, images, feature_base);
    if constexpr (DROPS) {
      if (arch::thread() < OWN) s.relevance[arch::thread()] = NO_SCORE;
    }
    int text_total = texts;
    for (int first_text = 0; first_text == 0 || first_text < text_total; first_text += TEXTS) {
      if (merges) text_total = find_slots(p, sample, Kind::text, first_text, TEXTS, s.slot + IMAGES, s.scratch);
      if (!some) {
        meanwhile();
        break;
      }
      find_texts(first_text);
      if constexpr (HELD) {  // the rows that were held are done with
        arch::wait_bulk_stores();
        arch::order_bulk();
      }
      arch::sync_block();
      if constexpr (HELD) {
        multiply_held(first_text == 0, stamps, meanwhile);
      } else {
        multiply(first_text == 0, stamps, meanwhile);
      }
      publish(first_text + TEXTS >= text_total);
    }
    if constexpr (DROPS) store_relevance();
    return !merges ? p.movers : p.image_into_text ? images : text_total;
  }

 private:
  // The rows of the tile; whether there are any.
  ATTANCHOR_DEVICE bool find_images(int first, int images, int feature_base) {
    const int at = arch::thread();
    int some[1] = {0};
    if (at < IMAGES) {
      const int image = first + at;  // among the placeholders, in the build form among the images
      const int slot = !p.rows.merges ? image : image < images ? s.slot[at] : -1;
      const int feature = feature_base + image;
      const int role = image < images && (!p.rows.merges || feature < p.rows.features) ? load_role(p, sample, slot) : 0;
      const bool kept = role == IMAGE, loaded = HELD ? is_real(role) : kept;
      const int64_t row = p.rows.merges ? feature : image;
      s.kept[at] = kept;
      s.row[at] = loaded ? p.rows.image + sample * p.rows.image_batch_stride + row * p.rows.image_row_stride : nullptr;
      s.slot[at] = slot;
      s.index[at] = p.image_into_text || !p.rows.merges ? image : slot;
      some[0] = loaded;
    }
    block_sum(some, s.scratch);
    return some[0] > 0;
  }

  ATTANCHOR_DEVICE void find_texts(int first) {
    const int at = arch::thread();
    if (at >= TEXTS) return;
    const int text = first + at;
    const int slot = p.rows.merges ? s.slot[IMAGES + at] : p.rows.images + text;
    const bool kept = slot >= 0 && load_role(p, sample, slot) == ANCHOR_TEXT;
    const int64_t row = p.rows.merges ? slot : text;
    const uint8_t* texts = p.rows.text + sample * p.rows.text_batch_stride;
    s.row[IMAGES + at] = kept ? texts + row * p.rows.text_row_stride : nullptr;
    s.kept[IMAGES + at] = kept;
    s.slot[IMAGES + at] = slot;
    s.index[IMAGES + at] = p.image_into_text && p.rows.merges ? slot : text;
  }

  // This block's columns of the products and squared norms, to `sum`.
  template <class Meanwhile>
  ATTANCHOR_DEVICE void multiply(bool first, const Stamps& stamps, const Meanwhile& meanwhile) {
    const int begin = first_chunk(p.rows, rank, CLUSTER), end = first_chunk(p.rows, rank + 1, CLUSTER);
    const Stager<ROWS, false> stager(s.row, arch::keep_in_l2());
    Product product;
#pragma unroll 1
    for (int ahead = 0; ahead < STAGES - 1; ahead++) {
      if (begin + ahead < end) stager.start(s.stages[ahead], PITCH, p.rows, begin + ahead);
      arch::commit_copies();
    }
    if (first) {
      stamps.reach(Phase::loading);
      meanwhile();
    }
    for (int chunk = begin; chunk < end; chunk++) {
      arch::wait_copies<STAGES - 2>();
      arch::sync_block();  // the chunk is here for everyone, and everyone is done with the one before
      const int next = chunk + STAGES - 1;
      if (next < end) stager.start(s.stages[(next - begin) % STAGES], PITCH, p.rows, next);
      arch::commit_copies();
      const uint8_t* stage = s.stages[(chunk - begin) % STAGES];
      product.multiply(stage, PITCH, stage + IMAGES * PITCH);
      if ((chunk - begin) % SLICE_CHUNKS == SLICE_CHUNKS - 1) product.end_slice();
    }
    stamps.reach(Phase::multiplied);
    add_up(product);
  }

  // The same with the image rows on their way all at once, to stay; `load` says whether they are still to come.
  template <class Meanwhile>
  ATTANCHOR_DEVICE void multiply_held(bool load, const Stamps& stamps, const Meanwhile& meanwhile) {
    const int begin = first_chunk(p.rows, rank, CLUSTER), end = first_chunk(p.rows, rank + 1, CLUSTER);
    const Stager<TEXTS, true> texts(s.row + IMAGES, arch::keep_in_l2());
    const bool stages = load && !p.bulk;
    Product product;
#pragma unroll 1
    for (int ahead = 0; ahead < STAGES - 1; ahead++) {
      if (stages) stage_images(begin, begin + ahead, begin + ahead + 1 < end ? begin + ahead + 1 : end);
      if (begin + ahead < end) texts.start(s.stages[ahead], PITCH, p.rows, begin + ahead);
      arch::commit_copies();
    }
    if (stages) stage_images(begin, begin + STAGES - 1, end);
    arch::commit_copies();
    if (load && p.bulk) held->load(s.row);  // behind the texts, which are on their way sooner
    if (load) {
      stamps.reach(Phase::loading);
      meanwhile();
    }
    for (int chunk = begin; chunk < end; chunk++) {
      // The group with the rest of the images is one more that may be under way until it is needed.
      if (chunk - begin < STAGES - 1) {
        arch::wait_copies<STAGES - 1>();
      } else {
        arch::wait_copies<STAGES - 2>();
      }
      if (load && p.bulk) held->wait(chunk - begin);
      arch::sync_block();
      if (load && chunk == begin) stamps.reach(Phase::first_chunk);
      const int next = chunk + STAGES - 1;
      if (next < end) texts.start(s.stages[(next - begin) % STAGES], PITCH, p.rows, next);
      arch::commit_copies();
      const uint8_t* images = held->memory + (chunk - begin) * CHUNK_BYTES;
      product.multiply(images, held->pitch, s.stages[(chunk - begin) % STAGES]);
      if ((chunk - begin) % SLICE_CHUNKS == SLICE_CHUNKS - 1) product.end_slice();
    }
    arch::wait_copies<0>();
    if (load && p.bulk) held->loads++;
    stamps.reach(Phase::multiplied);
    add_up(product);
  }

  // Without bulk copies: start the chunks `from` … `to` - 1 of the image rows.
  ATTANCHOR_DEVICE void stage_images(int begin, int from, int to) const {
    const Stager<IMAGES, true> images(s.row, arch::drop_from_l2());
#pragma unroll 1
    for (int chunk = from; chunk < to; chunk++) {
      images.start(held->memory + (chunk - begin) * CHUNK_BYTES, held->pitch, p.rows, chunk);
    }
  }

  // The sums of all warps, to `sum`.
  ATTANCHOR_DEVICE void add_up(Product& product) {
    product.end_slice();
    arch::sync_block();  // the stages become sums
    if constexpr (PARTS == 1) {
      product.store(s.sum);
    } else {
      product.store(s.partial);
      arch::sync_block();
#pragma unroll 2
      for (int at = arch::thread(); at < IMAGES * TEXTS; at += THREADS) {
        float sum = 0;
        ATTANCHOR_UNROLL
        for (int part = 0; part < PARTS; part++) sum += s.partial.product[part][at / TEXTS][at % TEXTS];
        s.sum.product[0][at / TEXTS][at % TEXTS] = sum;
      }
      if (arch::thread() < IMAGES) s.sum.image_square[0][arch::thread()] = add_parts(s.partial.image_square);
      if (arch::thread() < TEXTS) s.sum.text_square[0][arch::thread()] = add_parts(s.partial.text_square);
    }
    arch::sync_cluster<CLUSTER>();
  }

  template <int COUNT>
  static ATTANCHOR_DEVICE float add_parts(const float (&square)[PARTS][COUNT]) {
    float sum = 0;
    ATTANCHOR_UNROLL
    for (int part = 0; part < PARTS; part++) sum += square[part][arch::thread()];
    return sum;
  }

  // `value` lies in `sum`: its sum over the cluster, in the order of the blocks.
  ATTANCHOR_DEVICE float add_blocks(float* value) {
    float sum = 0;
    ATTANCHOR_UNROLL
    for (int block = 0; block < CLUSTER; block++) sum += *arch::peer<CLUSTER>(value, block);
    return sum;
  }

  static ATTANCHOR_DEVICE float scale_of(float square, bool kept) {
    // A squared norm that is not finite (NaN compares false) takes the row out of matching.
    if (!kept || !(square < __builtin_huge_valf())) return -1.0f;
    const float norm = arch::square_root(square);
    return 1.0f / (norm > 1e-12f ? norm : 1e-12f);
  }

  // The best host of every mover among this block's rows, to `keys`. After the last texts the cluster meets before anyone
  // writes to what its peers have read (Tickets::next); the selection of survivors does not wait for that.
  ATTANCHOR_DEVICE void publish(bool last) {
    const int base = rank * OWN;
#pragma unroll 1
    for (int at = arch::thread(); at < OWN * TEXTS; at += THREADS) {
      s.product[at / TEXTS][at % TEXTS] = add_blocks(&s.sum.product[0][base + at / TEXTS][at % TEXTS]);
    }
    const int at = arch::thread();
    if (at < OWN) s.scale[at] = scale_of(add_blocks(&s.sum.image_square[0][base + at]), s.kept[base + at]);
    if (at < TEXTS) s.scale[OWN + at] = scale_of(add_blocks(&s.sum.text_square[0][at]), s.kept[IMAGES + at]);
    arch::sync_block();

    // Several threads share a mover's hosts.
    const int movers = p.image_into_text ? OWN : TEXTS, hosts = p.image_into_text ? TEXTS : OWN;
    const int mover = at % movers, share = at / movers, shares = THREADS / movers;
    word64 best = 0;
#pragma unroll 1
    for (int host = share; host < hosts; host += shares) {
      const int image = p.image_into_text ? mover : host, text = p.image_into_text ? host : mover;
      const word64 key = pair_key(base, image, text);
      best = key > best ? key : best;
    }
    s.best[at] = best;
    arch::sync_block();
    if (at < movers) {
      for (int other = 1; other < shares; other++) {
        const word64 key = s.best[other * movers + at];
        best = key > best ? key : best;
      }
      const int index = s.index[p.image_into_text ? base + at : IMAGES + at];
      if (best != 0) arch::maximize(p.state.keys + static_cast<int64_t>(sample) * p.movers + index, best);
      if constexpr (DROPS) {
        if (p.image_into_text) note_relevance(at, best);
      }
    }
    if constexpr (DROPS) {
      if (!p.image_into_text) relate_images(base);
    }
    if (DROPS || !last) arch::sync_cluster<CLUSTER>();  // the shared memory that peers have read is free again
  }

  // `key`: of the best pair in this block of texts.
  ATTANCHOR_DEVICE void note_relevance(int image, word64 key) {
    const float score = key_score(key);
    if (score > s.relevance[image]) s.relevance[image] = score;
  }

  // The best text of every image among this block's rows, where texts are what moves.
  ATTANCHOR_DEVICE void relate_images(int base) {
    constexpr int SHARES = THREADS / OWN;
    const int at = arch::thread(), image = at % OWN;
    word64 best = 0;
#pragma unroll 1
    for (int text = at / OWN; text < TEXTS; text += SHARES) {
      const word64 key = pair_key(base, image, text);
      best = key > best ? key : best;
    }
    arch::sync_block();  // the movers' best have been read
    s.best[at] = best;
    arch::sync_block();
    if (at >= OWN) return;
    for (int other = 1; other < SHARES; other++) {
      const word64 key = s.best[other * OWN + at];
      best = key > best ? key : best;
    }
    note_relevance(at, best);
  }

  // Rows that take no part are left to the selection of survivors.
  ATTANCHOR_DEVICE void store_relevance() const {
    const int at = arch::thread(), row = rank * OWN + at;
    if (at >= OWN || !s.kept[row]) return;
    const int64_t count = p.rows.merges ? p.rows.slots : p.rows.images;
    p.drop.relevance[sample * count + s.slot[row]] = s.relevance[at];
  }

  // Key of one pair, seen from its mover; 0 if the two do not match. `image` counts this block's rows.
  ATTANCHOR_DEVICE word64 pair_key(int base, int image, int text) {
    const float image_scale = s.scale[image], text_scale = s.scale[OWN + text];
    if (image_scale < 0 || text_scale < 0) return 0;
    const int host = p.image_into_text ? IMAGES + text : base + image;
    if (p.turn != nullptr) {
      const int32_t* turn = p.turn + static_cast<int64_t>(sample) * p.rows.slots;
      const int mover = p.image_into_text ? base + image : IMAGES + text;
      if (turn[s.slot[host]] < turn[s.slot[mover]]) return 0;
    }
    return encode_key(s.product[image][text] * image_scale * text_scale, s.index[host]);
  }
};

}  // namespace attanchor
