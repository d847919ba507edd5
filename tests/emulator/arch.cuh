// The functions of csrc/arch.cuh on a CPU: every thread of the device is a fiber, and nothing runs in parallel.
//
// What it is stricter about than a GPU: fibers go on in random order after every meeting point; asynchronous copies
// arrive at random, as late as they may or as early; bulk copies too, which leave garbage until then and must be ordered
// behind what other threads did; maxima become visible to other blocks no sooner than a fence that a block barrier
// separates from them; shared memory starts as garbage, and is there from when its block begins until it ends; warp
// functions insist that all 32 lanes are there; a device runs only as many blocks at once as it is told to, and reports
// a deadlock instead of hanging.
// What it does not model: caches, and the order in which plain stores reach other blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define ATTANCHOR_DEVICE inline
#define ATTANCHOR_RARE inline
#define ATTANCHOR_KERNEL(threads, blocks) void
#define ATTANCHOR_ARGUMENT(type) const type
#define ATTANCHOR_UNROLL

namespace attanchor::arch {

using word64 = unsigned long long;

struct alignas(16) Vector {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Thread;

// A place where fibers wait for each other.
struct Barrier {
  int expected = 0;
  uint64_t generation = 0;
  std::vector<Thread*> waiting;
};

constexpr int MESSAGE_BYTES = 64;

struct Warp {
  Barrier barrier;
  alignas(16) uint8_t messages[2][32 * MESSAGE_BYTES];
  uint8_t kind[2][32];
};

struct Block {
  int index = 0;
  Barrier barrier;
  Barrier* cluster_barrier = nullptr;
  Block* const* cluster = nullptr;  // the blocks of its cluster
  uint8_t* shared = nullptr;
  Warp* warps = nullptr;
  bool begun = false;
  uint64_t loaded = 0;  // generation of its barrier, plus one, of its last bulk loads
  int running = 0;  // threads that have not ended
};

struct Thread {
  int index = 0;
  Block* block = nullptr;
  uint64_t meetings = 0;  // warp functions passed
  uint64_t ordered = 0;   // generation of the block's barrier, plus one, of its last order_bulk
};

extern Thread* current;
extern int grid_blocks, resident_limit;
extern int occupied;  // blocks of other work, which the device does not tell of
extern std::string failure;  // what the device answers when it is asked for its size

void wait(Barrier& barrier);
void pause();
void maybe_switch();
word64 clock();
void fail(const char* reason);
void queue_copy(void* to, const void* from, int bytes, int size);
void commit_copies();
void wait_copies(int pending);
void start_bulk_barrier(word64* barrier, int arrivals);
void expect_bulk(word64* barrier, int bytes);
bool is_open(const word64* barrier, unsigned parity);
void order_bulk();
void load_bulk(void* to, const void* from, int bytes, word64* barrier);
void store_bulk(void* to, const void* from, int bytes);
void wait_bulk_stores();
void maximize(word64* word, word64 value);
void publish_maxima();
const char* run(int blocks, int threads, int shared, int cluster, const std::function<void()>& kernel);

inline Warp& warp() { return current->block->warps[current->index / 32]; }

// All lanes of a warp show each other a value; returns the lanes' values, which stay until the next meeting but one.
template <class T>
const T* meet(const T& value, uint8_t kind) {
  static_assert(sizeof(T) <= MESSAGE_BYTES && alignof(T) <= 16);
  Warp& w = warp();
  const int lane = current->index % 32, turn = current->meetings++ % 2;
  std::memcpy(w.messages[turn] + lane * sizeof(T), &value, sizeof(T));
  w.kind[turn][lane] = kind;
  wait(w.barrier);
  if (w.kind[turn][0] != kind) fail("lanes of a warp meet in different functions");
  return reinterpret_cast<const T*>(w.messages[turn]);
}

}  // namespace emulator

// --- Element types -----------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(float value) { return value; }
inline float widen(Half value) {
  // Converted once: many processors need a long routine for it.
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (int bits = 0; bits < 65536; bits++) {
      const auto pattern = static_cast<uint16_t>(bits);
      _Float16 half;
      std::memcpy(&half, &pattern, 2);
      all[bits] = half;
    }
    return all;
  }();
  return table[value.bits];
}
inline float widen(BFloat value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

template <class E>
E narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline Half narrow<Half>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Half result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}
template <>
inline BFloat narrow<BFloat>(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline float multiply_add(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float square_root(float value) { return std::sqrt(value); }

// --- Where a thread is -------------------------------------------------------------------------------------------

inline int thread() { return emulator::current->index; }
inline int lane() { return emulator::current->index % 32; }
inline int warp() { return emulator::current->index / 32; }
inline int block() { return emulator::current->block->index; }
inline int blocks() { return emulator::grid_blocks; }
inline uint8_t* shared_memory() { return emulator::current->block->shared; }

// --- Inside a warp and a block -----------------------------------------------------------------------------------

inline void sync_block() { emulator::wait(emulator::current->block->barrier); }

inline uint32_t ballot(bool vote) {
  const bool* votes = emulator::meet(vote, 1);
  uint32_t word = 0;
  for (int lane = 0; lane < 32; lane++) word |= static_cast<uint32_t>(votes[lane]) << lane;
  return word;
}
template <class T>
T shuffle(T value, int source) {
  return emulator::meet(value, 2)[source & 31];
}
template <class T>
T shuffle_xor(T value, int mask) {
  return emulator::meet(value, 3)[lane() ^ mask];
}
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline int highest_bit(uint32_t word) { return 31 - __builtin_clz(word); }
inline void add_shared(int* counter, int amount) {
  emulator::maybe_switch();
  *counter += amount;
}

// --- Between blocks ----------------------------------------------------------------------------------------------

inline void maximize(word64* word, word64 value) { emulator::maximize(word, value); }
inline unsigned add(unsigned* counter, unsigned amount) {
  emulator::maybe_switch();
  const unsigned before = *counter;
  *counter += amount;
  emulator::maybe_switch();
  return before;
}
inline void count(unsigned* counter, unsigned amount) { add(counter, amount); }
inline void fence() {
  emulator::publish_maxima();
  emulator::maybe_switch();
}
inline unsigned load_now(const unsigned* word) {
  emulator::maybe_switch();
  return *word;
}
inline unsigned load_acquire(const unsigned* word) { return *word; }
template <class T>
T load_fresh(const T* word) {
  emulator::maybe_switch();
  return *word;
}
inline void pause() { emulator::pause(); }
inline word64 now() { return emulator::clock(); }

// --- Clusters -------------------------------------------------------------------------------------------------------

constexpr int LARGEST_CLUSTER = 8;

inline void fail(const char* why) { emulator::fail(why); }

template <int CLUSTER>
int cluster_rank() {
  return emulator::current->block->index % CLUSTER;
}
template <int CLUSTER>
void sync_cluster() {
  emulator::wait(*emulator::current->block->cluster_barrier);
}
template <int CLUSTER>
void meet_cluster() {
  sync_cluster<CLUSTER>();
}
template <int CLUSTER, class T>
T* peer(T* own, int rank) {
  const emulator::Block& block = *emulator::current->block;
  const emulator::Block& other = *block.cluster[rank];
  if (!other.begun || other.running == 0) emulator::fail("a block reaches into one that has not begun or has ended");
  const auto offset = reinterpret_cast<const volatile uint8_t*>(own) - block.shared;
  return reinterpret_cast<T*>(other.shared + offset);
}

// --- Global to shared memory ------------------------------------------------------------------------------------------

using Policy = int;
inline Policy keep_in_l2() { return 0; }
inline Policy drop_from_l2() { return 0; }

template <int SIZE>
void copy_async(void* to, const void* from, int bytes, Policy) {
  if (reinterpret_cast<uintptr_t>(to) % SIZE || reinterpret_cast<uintptr_t>(from) % SIZE) {
    emulator::fail("an asynchronous copy is not aligned");
  }
  emulator::queue_copy(to, from, bytes, SIZE);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING>
void wait_copies() {
  emulator::wait_copies(PENDING);
}

// --- Bulk copies --------------------------------------------------------------------------------------------------------

inline void start_bulk_barrier(word64* barrier, int arrivals) { emulator::start_bulk_barrier(barrier, arrivals); }
inline void show_bulk_barriers() { emulator::maybe_switch(); }
inline void expect_bulk(word64* barrier, int bytes) { emulator::expect_bulk(barrier, bytes); }
template <class Patience>
void wait_bulk(word64* barrier, unsigned parity, const Patience& patience) {
  for (; !emulator::is_open(barrier, parity); emulator::pause()) patience.check();
}
inline void order_bulk() { emulator::order_bulk(); }
inline void load_bulk(void* to, const void* from, int bytes, word64* barrier, Policy) {
  emulator::load_bulk(to, from, bytes, barrier);
}
inline void store_bulk(void* to, const void* from, int bytes) { emulator::store_bulk(to, from, bytes); }
inline void wait_bulk_stores() { emulator::wait_bulk_stores(); }

// --- Streaming access ---------------------------------------------------------------------------------------------------

template <class V>
V load_stream(const V* from, Policy) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V)) emulator::fail("a load is not aligned");
  return *from;
}
template <class V>
void store_stream(V* to, V value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(V)) emulator::fail("a store is not aligned");
  *to = value;
}

// --- Tensor cores ---------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a matrix row is not aligned");
  const void* const* rows = emulator::meet(row, 4);
  for (int matrix = 0; matrix < 4; matrix++) {
    const void* from = rows[matrix * 8 + lane() / 4];
    std::memcpy(&r[matrix], static_cast<const uint8_t*>(from) + lane() % 4 * 4, 4);
  }
  // Before any lane goes on and overwrites what others have yet to read.
  emulator::wait(emulator::warp().barrier);
}

namespace emulator {

struct Fragments {
  uint32_t a[4], b[2];
};

template <class E>
double element(uint32_t word, int half) {
  return widen(E{static_cast<uint16_t>(word >> (half * 16))});
}

// Tensor cores add with truncation: the sum is rounded towards zero, so that errors do not cancel.
inline float truncated(double sum) {
  const float rounded = static_cast<float>(sum);
  if (!std::isfinite(rounded) || std::fabs(static_cast<double>(rounded)) <= std::fabs(sum)) return rounded;
  return std::nextafterf(rounded, 0.0f);
}

}  // namespace emulator

template <class E>
void multiply_matrices(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const emulator::Fragments* all = emulator::meet(emulator::Fragments{{a0, a1, a2, a3}, {b0, b1}}, 5);
  const int row = lane() / 4 * 4, column = lane() % 4 * 8;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 16; k++) {
    const int word = k % 8 / 2, half = k / 8;
    const uint32_t(&a)[4] = all[row + word].a;
    const double above = emulator::element<E>(a[half * 2], k % 2), below = emulator::element<E>(a[half * 2 + 1], k % 2);
    const double left = emulator::element<E>(all[column + word].b[half], k % 2);
    const double right = emulator::element<E>(all[column + 4 + word].b[half], k % 2);
    sums[0] += above * left;
    sums[1] += above * right;
    sums[2] += below * left;
    sums[3] += below * right;
  }
  for (int i = 0; i < 4; i++) c[i] = emulator::truncated(sums[i]);
}

// --- Launch -----------------------------------------------------------------------------------------------------------

template <class K>
const char* count_resident(K, int, int, int cluster, int& count) {
  count = emulator::resident_limit / cluster * cluster;
  return emulator::failure.empty() ? nullptr : emulator::failure.c_str();
}

template <class Argument>
const char* launch(void (*kernel)(Argument), int blocks, int threads, int shared, int cluster, void*,
                   const Argument& argument) {
  return emulator::run(blocks, threads, shared, cluster, [&] { kernel(argument); });
}

}  // namespace attanchor::arch
