// When a block reaches each phase of its items: in a build with ATTANCHOR_STAMPS (`python -m benchmarks phases`), which
// also ends a kernel that waits for a second; in any other build nothing.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace attanchor {

// As benchmarks/phases.py names them.
enum class Phase : int { begun, loading, first_chunk, multiplied, published, arrived, met, waited, planned, copied, COUNT };

#ifdef ATTANCHOR_STAMPS

struct Stamps {
  const Problem& p;
  int item = 0;

  ATTANCHOR_DEVICE void reach(Phase phase) const {
    if (arch::thread() > 0 || arch::block() >= p.stamps.blocks || item >= p.stamps.items) return;
    const int64_t row = static_cast<int64_t>(arch::block()) * p.stamps.items + item;
    p.stamps.times[row * static_cast<int>(Phase::COUNT) + static_cast<int>(phase)] = arch::now();
  }
  ATTANCHOR_DEVICE void next() { item++; }
};

// Between looks at what is waited for.
struct Patience {
  static constexpr arch::word64 LIMIT = 1000000000;  // ns
  const char* in_vain;
  const arch::word64 begin = arch::now();

  ATTANCHOR_DEVICE explicit Patience(const char* what) : in_vain(what) {}
  ATTANCHOR_DEVICE void check() const {
    if (arch::now() - begin > LIMIT) arch::fail(in_vain);
  }
};

#else

struct Stamps {
  const Problem& p;

  ATTANCHOR_DEVICE void reach(Phase) const {}
  ATTANCHOR_DEVICE void next() {}
};

struct Patience {
  ATTANCHOR_DEVICE explicit Patience(const char*) {}
  ATTANCHOR_DEVICE void check() const {}
};

#endif

}  // namespace attanchor
