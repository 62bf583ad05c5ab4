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
  switch (work.activation.kind) {
    case 1: return finish_as<1>(work, row, sums);
    case 2: return finish_as<2>(work, row, sums);
    case 3: return finish_as<3>(work, row, sums);
    case 4: return finish_as<4>(work, row, sums);
    case 5: return finish_as<5>(work, row, sums);
    default: return finish_as<0>(work, row, sums);
  }
}

// Whether the tile is one piece, and the activation but two bounds: then sums go from registers to y.
static inline bool finishes_directly(const Work &work) {
  return work.y && work.piece_count == 1 && is_bounds(work.activation);
}

template <int V>
static inline void finish_directly(const Work &work, uint32_t row, Vec (&sum)[V]) {
  const int64_t at = row * work.plane + work.pieces[0].to;
  const int32_t length = work.pieces[0].length;
  const Vec low = all(lower_bound(work.activation)), high = all(upper_bound(work.activation));
#pragma GCC unroll 14
  for (int j = 0; j < V; ++j) {
    const int rest = length - j * kLanes;
    if (rest >= kLanes) {
      if (work.residual) sum[j] += load(work.residual + at + j * kLanes);
      store(work.y + at + j * kLanes, at_most(at_least(sum[j], low), high));
    } else if (rest > 0) {
      if (work.residual) sum[j] += load_some(work.residual + at + j * kLanes, rest);
      store_some(work.y + at + j * kLanes, at_most(at_least(sum[j], low), high), rest);
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
