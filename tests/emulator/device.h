// What the emulated device is made of, for its two halves: the scheduler (emulator.cpp), and what goes on beside the
// threads that started it (asynchronous.cpp).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "arch.cuh"

namespace attanchor::arch::emulator {

constexpr uint8_t GARBAGE = 0xcb;

struct Piece {
  void* to;
  const void* from;
  int bytes, size;

  void arrive() const {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<uint8_t*>(to) + bytes, 0, size - bytes);
  }
};

struct CopyGroup {
  std::vector<Piece> pieces;
  bool arrived = false;

  void arrive() {
    if (!arrived) {
      for (const Piece& piece : pieces) piece.arrive();
    }
    arrived = true;
  }
};

enum class State { ready, pausing, waiting, done };

struct Fiber : Thread {
  State state = State::ready;
  bool started = false;
  jmp_buf where;
  uint8_t* stack = nullptr;
  std::vector<Piece> open;
  std::deque<CopyGroup> groups;
  ucontext_t first;  // large, and used but once: the rest lies close together
};

struct Maximum {
  word64* word;
  word64 value;
  const Thread* thread;
  uint64_t generation;  // of the block's barrier
};

// A bulk copy under way. Loads have a barrier, stores the thread that waits for them.
struct Flight {
  uint8_t* to;
  const uint8_t* from;
  int bytes;
  word64* barrier;
  const Block* block;
  const Thread* storer;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> members;
  std::vector<std::vector<Maximum>> maxima;  // of each block, not yet visible to others
  std::vector<std::vector<uint8_t>> shared;
  std::vector<std::vector<Warp>> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Barrier barrier;
  int running = 0;
};

struct Device {
  std::mt19937_64 random{0};
  std::vector<Fiber*> ready, pausing;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<uint8_t*> stacks;
  size_t mapped = 0;  // stacks ever
  std::vector<Flight> flights;
  std::string error;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  const std::function<void()>* kernel = nullptr;
  int pauses = 0;  // in a row, with nothing else to run
  uint64_t steps = 0, change_at = 0;
  const Block* slow_block = nullptr;
  int slow_warp = 0;
  int landing = 4;  // of so many steps about one lets a bulk copy arrive
};

extern Device device;
extern bool launches;  // or they are accepted and forgotten
extern uint64_t nanoseconds;  // of a step of the scheduler

inline Fiber* self() { return static_cast<Fiber*>(current); }

// Gives the turn back to the scheduler.
void leave(State state);

// The place of a block in a cluster, -1 if it is of another.
int in_cluster(const Cluster& cluster, const Block* block);

// The bulk copy number `at` of those under way arrives.
void land(size_t at);

}  // namespace attanchor::arch::emulator
