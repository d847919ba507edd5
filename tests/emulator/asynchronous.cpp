// Copies that go on beside the threads that started them, and arrive as late as they may.
#include "device.h"

namespace attanchor::arch::emulator {
namespace {

constexpr uint8_t STARTED = 0xb5;

struct BulkBarrier {
  int32_t bytes;  // to come; negative while more has come than was expected
  uint8_t arrivals, pending, phase, mark;
};
static_assert(sizeof(BulkBarrier) == sizeof(word64));

// What is done to a bulk barrier, and whether it opens.
template <class Change>
void change(word64* word, Change change) {
  BulkBarrier barrier;
  std::memcpy(&barrier, word, sizeof(barrier));
  if (barrier.mark != STARTED) {
    device.error = "a bulk barrier that nobody has started";
    return;
  }
  change(barrier);
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    barrier.phase++;
  }
  std::memcpy(word, &barrier, sizeof(barrier));
}

void check_bulk(const void* to, const void* from, int bytes) {
  if (bytes <= 0 || (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) {
    fail("a bulk copy is not aligned");
  }
}

std::vector<Fiber*> fibers_of(const Block& block) {
  std::vector<Fiber*> found;
  for (auto& cluster : device.clusters) {
    if (in_cluster(*cluster, &block) < 0) continue;
    for (auto& fiber : cluster->fibers) {
      if (fiber->block == &block) found.push_back(fiber.get());
    }
  }
  return found;
}

}  // namespace

// --- Copies of 16 bytes and less, in groups ---------------------------------------------------------------------------

void queue_copy(void* to, const void* from, int bytes, int size) {
  if (bytes < 0 || bytes > size) fail("an asynchronous copy of a wrong size");
  // Until it has arrived nobody may rely on what was there before.
  self()->open.push_back({to, from, bytes, size});
}

void commit_copies() {
  Fiber* fiber = self();
  fiber->groups.push_back({std::move(fiber->open), false});
  fiber->open.clear();
  if (device.random() % 2) fiber->groups.back().arrive();
}

void wait_copies(int pending) {
  auto& groups = self()->groups;
  while (static_cast<int>(groups.size()) > pending) {
    groups.front().arrive();
    groups.pop_front();
  }
}

// --- Bulk copies ----------------------------------------------------------------------------------------------------------

void land(size_t at) {
  const Flight flight = device.flights[at];
  device.flights[at] = device.flights.back();
  device.flights.pop_back();
  std::memcpy(flight.to, flight.from, flight.bytes);
  if (flight.barrier != nullptr) change(flight.barrier, [&](BulkBarrier& barrier) { barrier.bytes -= flight.bytes; });
}

void start_bulk_barrier(word64* barrier, int arrivals) {
  const auto all = static_cast<uint8_t>(arrivals);
  const BulkBarrier started = {0, all, all, 0, STARTED};
  std::memcpy(barrier, &started, sizeof(started));
}

void expect_bulk(word64* barrier, int bytes) {
  maybe_switch();
  change(barrier, [&](BulkBarrier& now) {
    if (now.pending == 0) device.error = "more threads arrive at a bulk barrier than it was started for";
    now.bytes += bytes;
    now.pending--;
  });
}

bool is_open(const word64* barrier, unsigned parity) {
  BulkBarrier now;
  std::memcpy(&now, barrier, sizeof(now));
  if (now.mark != STARTED) fail("a bulk barrier that nobody has started");
  return now.phase % 2 != parity;
}

void order_bulk() { current->ordered = current->block->barrier.generation + 1; }

void load_bulk(void* to, const void* from, int bytes, word64* barrier) {
  check_bulk(to, from, bytes);
  Block& block = *current->block;
  const uint64_t now = block.barrier.generation + 1;
  if (block.loaded != now) {  // the first load since a barrier: are all threads done with what was there?
    for (const Fiber* fiber : fibers_of(block)) {
      if (fiber->ordered <= block.loaded || fiber->ordered >= now) {
        fail("a bulk load that does not come behind what every thread did to shared memory before");
      }
    }
    block.loaded = now;
  }
  for (const Flight& flight : device.flights) {
    const auto* begin = static_cast<uint8_t*>(to);
    if (flight.storer != nullptr && flight.from < begin + bytes && begin < flight.from + flight.bytes) {
      fail("a bulk load into memory that a bulk store still reads");
    }
  }
  std::memset(to, GARBAGE, bytes);
  device.flights.push_back(
      {static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, barrier, &block, nullptr});
  maybe_switch();
}

void store_bulk(void* to, const void* from, int bytes) {
  check_bulk(to, from, bytes);
  device.flights.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, nullptr,
                            current->block, current});
  maybe_switch();
}

void wait_bulk_stores() {
  for (size_t at = device.flights.size(); at-- > 0;) {
    if (device.flights[at].storer == current) land(at);
  }
}

}  // namespace attanchor::arch::emulator
