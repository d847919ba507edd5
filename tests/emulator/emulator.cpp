// The scheduler behind arch.cuh: fibers, barriers, and a device that runs few blocks at once.
#include "device.h"

#include <sys/mman.h>

#include <algorithm>

namespace attanchor::arch::emulator {

Thread* current = nullptr;
int grid_blocks = 0;
int resident_limit = 4;
int occupied = 0;
std::string failure;
bool launches = true;
uint64_t nanoseconds = 1;
Device device;

void leave(State state) {
  Fiber* fiber = self();
  fiber->state = state;
  if (_setjmp(fiber->where) == 0) _longjmp(device.scheduler, 1);
}

int in_cluster(const Cluster& cluster, const Block* block) {
  for (size_t i = 0; i < cluster.members.size(); i++) {
    if (cluster.members[i] == block) return static_cast<int>(i);
  }
  return -1;
}

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int CANARY_BYTES = 256;

void enter() {
  current->block->begun = true;
  (*device.kernel)();
  for (CopyGroup& group : self()->groups) group.arrive();
  for (const Flight& flight : device.flights) {
    if (flight.storer == current) device.error = "a thread ends while what it stores is still read from shared memory";
  }
  current->block->running--;
  leave(State::done);
}

uint8_t* take_stack() {
  if (!device.stacks.empty()) {
    uint8_t* stack = device.stacks.back();
    device.stacks.pop_back();
    return stack;
  }
  // Not all at the same place in their pages: their busy ends would share a few lines of the cache.
  const size_t shift = device.mapped++ % 32 * 11 * 64;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return static_cast<uint8_t*>(mmap(nullptr, STACK_BYTES + shift, PROT_READ | PROT_WRITE, flags, -1, 0)) + shift;
}

void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(device.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->where, 1);
  fiber->started = true;
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = fiber->stack = take_stack();
  fiber->first.uc_stack.ss_size = STACK_BYTES;
  fiber->first.uc_link = nullptr;
  makecontext(&fiber->first, enter, 0);
  swapcontext(&device.scheduler_context, &fiber->first);
}

std::vector<Maximum>& maxima_of(const Block* block) {
  for (auto& cluster : device.clusters) {
    const int at = in_cluster(*cluster, block);
    if (at >= 0) return cluster->maxima[at];
  }
  std::abort();
}

void show(const Maximum& maximum) {
  if (maximum.value > *maximum.word) *maximum.word = maximum.value;
}

void start_cluster(int first_block, int size, int threads, int shared) {
  auto cluster = std::make_unique<Cluster>();
  cluster->barrier.expected = size * threads;
  cluster->maxima.resize(size);
  for (int i = 0; i < size; i++) {
    cluster->shared.emplace_back(shared + CANARY_BYTES + 128, GARBAGE);
    cluster->warps.emplace_back(threads / 32);
    cluster->blocks.push_back(std::make_unique<Block>());
    cluster->members.push_back(cluster->blocks.back().get());
  }
  for (int i = 0; i < size; i++) {
    Block& block = *cluster->members[i];
    block.index = first_block + i;
    block.barrier.expected = block.running = threads;
    block.cluster_barrier = &cluster->barrier;
    block.cluster = cluster->members.data();
    const auto address = reinterpret_cast<uintptr_t>(cluster->shared[i].data());
    block.shared = reinterpret_cast<uint8_t*>((address + 127) / 128 * 128);
    block.warps = cluster->warps[i].data();
    for (Warp& warp : cluster->warps[i]) warp.barrier.expected = 32;
    for (int thread = 0; thread < threads; thread++) {
      cluster->fibers.push_back(std::make_unique<Fiber>());
      Fiber* fiber = cluster->fibers.back().get();
      fiber->index = thread;
      fiber->block = &block;
      device.ready.push_back(fiber);
    }
  }
  cluster->running = size * threads;
  device.clusters.push_back(std::move(cluster));
}

// A random fiber, but for a while at a time hardly any of one block, or of one of its warps: it must fall as far behind
// as what waits for it allows. `fair`: any of them, since nothing else may be left that can go on.
Fiber* take(std::vector<Fiber*>& from, bool fair) {
  if (device.steps++ == device.change_at) {
    const auto& cluster = *device.clusters[device.random() % device.clusters.size()];
    device.slow_block = cluster.members[device.random() % cluster.members.size()];
    device.slow_warp = static_cast<int>(device.random() % 16);  // 8 and above: all of them
    device.landing = 1 << (1 + device.random() % 20);
    device.change_at = device.steps + (1u << device.random() % 18);
  }
  size_t at = 0;
  for (int attempt = 0; attempt < 16; attempt++) {
    at = device.random() % from.size();
    const bool is_slow = from[at]->block == device.slow_block &&
                         (device.slow_warp >= 8 || from[at]->index / 32 == device.slow_warp);
    if (fair || !is_slow) break;
  }
  Fiber* fiber = from[at];
  from[at] = from.back();
  from.pop_back();
  return fiber;
}

// A thread has ended: with the last of a cluster its blocks leave the device. Whether that happened.
bool retire(Fiber* fiber, int shared) {
  device.stacks.push_back(fiber->stack);
  for (size_t i = 0; i < device.clusters.size(); i++) {
    Cluster& cluster = *device.clusters[i];
    if (in_cluster(cluster, fiber->block) < 0) continue;
    if (--cluster.running > 0) return false;
    for (auto& maxima : cluster.maxima) {
      for (const Maximum& maximum : maxima) show(maximum);
    }
    for (const Block* block : cluster.members) {
      for (const Flight& flight : device.flights) {
        if (flight.block == block) device.error = "a block ends with a bulk copy under way";
      }
      for (int at = 0; at < CANARY_BYTES; at++) {
        if (block->shared[shared + at] != GARBAGE) device.error = "a block writes past its shared memory";
      }
    }
    device.clusters.erase(device.clusters.begin() + i);
    return true;
  }
  std::abort();
}

}  // namespace

void fail(const char* reason) {
  if (device.error.empty()) device.error = reason;
  leave(State::done);
}

void wait(Barrier& barrier) {
  if (static_cast<int>(barrier.waiting.size()) + 1 < barrier.expected) {
    barrier.waiting.push_back(current);
    leave(State::waiting);
    return;
  }
  barrier.generation++;
  for (Thread* thread : barrier.waiting) device.ready.push_back(static_cast<Fiber*>(thread));
  barrier.waiting.clear();
  // The last to arrive has no right to go on first.
  if (device.random() % 4) return;
  device.ready.push_back(self());
  leave(State::ready);
}

void pause() {
  device.pausing.push_back(self());
  leave(State::pausing);
}

void maybe_switch() {
  if (device.random() % 8) return;
  device.ready.push_back(self());
  leave(State::ready);
}

word64 clock() { return device.steps * nanoseconds + 1; }

void maximize(word64* word, word64 value) {
  maybe_switch();
  maxima_of(current->block).push_back({word, value, current, current->block->barrier.generation});
}

void publish_maxima() {
  auto& maxima = maxima_of(current->block);
  std::vector<Maximum> kept;
  for (const Maximum& maximum : maxima) {
    const bool known = maximum.thread == current || maximum.generation < current->block->barrier.generation;
    if (known) {
      show(maximum);
    } else {
      kept.push_back(maximum);
    }
  }
  maxima = std::move(kept);
}

const char* run(int blocks, int threads, int shared, int cluster, const std::function<void()>& kernel) {
  static std::string outcome;
  if (threads % 32 || blocks % cluster || resident_limit < cluster) return "a launch that no device accepts";
  if (!launches) return nullptr;
  device.error.clear();
  device.kernel = &kernel;
  device.pauses = 0;
  grid_blocks = blocks;
  const int room = std::max(resident_limit - occupied, cluster);
  int next = 0, resident = 0;
  while (device.error.empty()) {
    while (next < blocks && resident + cluster <= room) {
      start_cluster(next, cluster, threads, shared);
      next += cluster;
      resident += cluster;
    }
    if (resident == 0) break;
    const bool stuck = device.ready.empty() && device.pauses > 0;
    if (!device.flights.empty() && (stuck || device.random() % device.landing == 0)) {
      land(device.random() % device.flights.size());
      device.pauses = 0;
    }
    const bool polls = !device.pausing.empty() && (device.ready.empty() || device.random() % 64 == 0);
    if (!polls && device.ready.empty()) {
      device.error = "deadlock: every thread waits at a barrier";
      break;
    }
    device.pauses = polls && device.ready.empty() ? device.pauses + 1 : 0;
    if (device.pauses > 64 * (static_cast<int>(device.pausing.size()) + 1)) {
      device.error = "deadlock: every thread waits for another block";
      break;
    }
    Fiber* fiber = take(polls ? device.pausing : device.ready, device.ready.empty());
    resume(fiber);
    if (fiber->state != State::pausing) device.pauses = 0;  // what it waited for has come
    if (fiber->state == State::done && device.error.empty() && retire(fiber, shared)) resident -= cluster;
  }
  for (auto& left : device.clusters) {
    for (auto& fiber : left->fibers) {
      if (fiber->stack != nullptr && fiber->state != State::done) device.stacks.push_back(fiber->stack);
    }
  }
  device.clusters.clear();
  device.flights.clear();
  device.ready.clear();
  device.pausing.clear();
  current = nullptr;
  outcome = device.error;
  return outcome.empty() ? nullptr : outcome.c_str();
}

}  // namespace attanchor::arch::emulator

// For ctypes: how many blocks run at once, how many of those other work takes, and the order in which things happen.
extern "C" void attanchor_emulate(int resident, int others, uint64_t seed) {
  using namespace attanchor::arch::emulator;
  resident_limit = resident;
  occupied = others;
  device.random.seed(seed);
  device.steps = device.change_at = 0;
}

// For ctypes: what the device answers from now on when it is asked how much it runs; empty: the truth.
extern "C" void attanchor_emulate_failure(const char* failure) { attanchor::arch::emulator::failure = failure; }

// For ctypes: whether launches run from now on, or are accepted and forgotten.
extern "C" void attanchor_emulate_launches(bool run) { attanchor::arch::emulator::launches = run; }

// For ctypes: how long a step of a thread takes from now on, in nanoseconds.
extern "C" void attanchor_emulate_clock(uint64_t step) { attanchor::arch::emulator::nanoseconds = step; }
