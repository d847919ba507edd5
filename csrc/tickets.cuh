// How the clusters of a launch share its work: items in rising order, handed out by one counter.
//
// The first is drawn like any other. Were it a cluster's number, one that has not begun, as other work keeps it off the
// device, would hold an item that those that run wait for.
#pragma once

#include "counters.cuh"

namespace attanchor {

template <int CLUSTER>
struct Tickets {
  static constexpr unsigned NONE = ~0u;  // not drawn: above every item
  static constexpr int DRAWER = 32;      // a thread of the second warp: the first has enough to wait for

  const Problem& p;
  unsigned* const slots;  // two, in the shared memory of every block
  const int rank;
  const unsigned total;
  int turn = 0;
  unsigned drawn = 0;

  ATTANCHOR_DEVICE unsigned first() {
    take();
    if constexpr (CLUSTER > 1) arch::meet_cluster<CLUSTER>();  // nobody reaches into a block that has not begun
    turn = 1;
    tell();
    arch::sync_cluster<CLUSTER>();
    turn = 0;
    return slots[0];
  }

  // Draw the next one, once an item, by the block where it waits for something else: to take is to ask, to tell has the
  // answer.
  ATTANCHOR_DEVICE void draw() {
    take();
    tell();
  }
  ATTANCHOR_DEVICE void take() {
    if (draws()) drawn = arch::add(p.state.ticket, 1);
  }
  ATTANCHOR_DEVICE void tell() const {
    if (!draws()) return;
    // Every cluster draws one ticket that is too high; with the last of them nobody will draw again.
    if (drawn == total + arch::blocks() / CLUSTER - 1) *p.state.ticket = 0;
    show(drawn);
  }

  // The same only if one below `end` is left, or else NONE; those that are gone stay so.
  ATTANCHOR_DEVICE void draw_below(unsigned end) {
    if (draws() && arch::load_now(p.state.ticket) >= end) {
      show(NONE);
    } else {
      draw();
    }
  }

  // What was drawn. By the cluster: what a block had in its shared memory for its peers is its own again. Since all that
  // a thread of every block has stood at a fence, behind a barrier of the block or by itself.
  ATTANCHOR_DEVICE unsigned next() {
    arch::meet_cluster<CLUSTER>();
    turn ^= 1;
    return slots[turn];
  }

 private:
  ATTANCHOR_DEVICE bool draws() const { return rank == 0 && arch::thread() == DRAWER; }

  ATTANCHOR_DEVICE void show(unsigned ticket) const {
    for (int block = 0; block < CLUSTER; block++) *arch::peer<CLUSTER>(slots + (turn ^ 1), block) = ticket;
  }
};

}  // namespace attanchor
