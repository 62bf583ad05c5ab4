// Finished rows of an image: residual, activation, and the way to the output.
#pragma once

#include "activations.h"

namespace secateur {
namespace SECATEUR_ISA {

// The first count lanes alone.
static inline Vec load_some(const float *p, int count) { return Between(0, count).load(p); }
static inline void store_some(float *p, Vec v, int count) { Between(0, count).store(p, v); }

// One row of y from sums. The activation is known here, so that no loop asks for it.
//
// The pieces of a row go out in ascending order, so a vector may run over the end of its piece:
// the next piece overwrites what it spilled. The last piece stops exactly.
template <int Kind>
static inline void finish_as(const Work &work, uint32_t row, const float *sums) {
  const Activation how = {Kind, work.activation.alpha, work.activation.beta};
  float *const y = work.y + row * work.plane;
  const float *const residual = work.residual ? work.residual + row * work.plane : nullptr;
  const Piece &last = work.pieces[work.piece_count - 1];
  for (int i = 0; i < work.piece_count; ++i) {
    const Piece &piece = work.pieces[i];
    const float *const from = sums + piece.from;
    int j = 0;
    for (; j + kLanes <= piece.length; j += kLanes) {
      Vec v = load(from + j);
      if (residual) v += load(residual + piece.to + j);
      store(y + piece.to + j, activate(v, how));
    }
    const int rest = piece.length - j;
    if (rest == 0) continue;
    const bool room = last.to + last.length >= piece.to + j + kLanes;
    Vec v = load(from + j);
    if (residual) {
      v += room ? load(residual + piece.to + j) : load_some(residual + piece.to + j, rest);
    }
    v = activate(v, how);
    if (room) {
      store(y + piece.to + j, v);
    } else {
      store_some(y + piece.to + j, v, rest);
    }
  }
}

static inline void finish_row(const Work &work, uint32_t row, const float *sums) {
  with_kind(work.activation, [&](auto kind) { finish_as<kind.value>(work, row, sums); });
}

// Whether sums can go from registers to y: every vector of the tile lies in one piece, and the
// activation is but two bounds.
static inline bool finishes_directly(const Work &work) {
  return work.y && work.landings && is_bounds(work.activation);
}

template <int V>
static inline void finish_directly(const Work &work, uint32_t row, Vec (&sum)[V]) {
  float *const y = work.y + row * work.plane;
  const float *const residual = work.residual ? work.residual + row * work.plane : nullptr;
  const Vec low = all(lower_bound(work.activation)), high = all(upper_bound(work.activation));
  const Piece first = work.pieces[0];
  if (first.length == V * kLanes) {
    float *const to = y + first.to;
    if (residual) {
      const float *const from = residual + first.to;
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[j] += load(from + j * kLanes);
    }
#pragma GCC unroll 14
    for (int j = 0; j < V; ++j) store(to + j * kLanes, at_most(at_least(sum[j], low), high));
    return;
  }
  const Landing *const landings = work.landings;
#pragma GCC unroll 14
  for (int j = 0; j < V; ++j) {
    const Landing landing = landings[j];
    if (landing.length == kLanes) {
      if (residual) sum[j] += load(residual + landing.to);
      store(y + landing.to, at_most(at_least(sum[j], low), high));
    } else if (landing.length) {
      if (residual) sum[j] += load_some(residual + landing.to, landing.length);
      store_some(y + landing.to, at_most(at_least(sum[j], low), high), landing.length);
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
