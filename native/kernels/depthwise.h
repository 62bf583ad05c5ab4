// Depthwise convolutions: every output channel sees one input channel, and all its taps.
//
//   y[oy][ox] = bias + sum over ky, kx of w[ky][kx] * x[oy * S + ky - pad][ox * S + kx - pad]
//
// Depthwise layers are seldom pruned, but between sparse layers the dense runtime would change the
// layout of all activations for them and back again. R rows of the output are made at a time: they
// share the rows of the input, so that R = 4 rows of a 3 x 3 kernel need 18 loads for 36
// multiply-adds. What lies left and right of the image is masked, not padded: nothing is copied, and
// the vectors in between need no mask.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

// Which lanes of the taps of a column of the kernel lie inside the image, for a vector of outputs.
template <int K>
struct Inside {
  IntVec lanes[K];
};

template <int K, int S>
static inline Inside<K> inside_of(const DepthwiseWork &work, int64_t ox) {
  const int64_t first = ox * S - work.pad_x;
  Inside<K> inside;
  IntVec lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 5
  for (int kx = 0; kx < K; ++kx) {
    const IntVec column = lane * S + static_cast<int32_t>(first + kx);
    inside.lanes[kx] = (column >= 0) & (column < static_cast<int32_t>(work.width));
  }
  return inside;
}

// R rows of a vector. Whole: nothing of it lies behind the plane, and no rest has to be stored, for
// which some processors need so many registers that the weights would have to leave theirs.
template <int K, int S, int R, bool Bounds, bool Masked, bool Whole>
static inline __attribute__((always_inline)) void depthwise_rows(const DepthwiseWork &work,
                                                                 const Vec (&weight)[K * K],
                                                                 const Vec (&bounds)[2],
                                                                 int64_t oy, int64_t ox,
                                                                 const Inside<K> &inside) {
  Vec sum[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i] = all(*work.bias);
#pragma GCC unroll 11
  for (int r = 0; r < (R - 1) * S + K; ++r) {
    const int64_t iy = oy * S + r - work.pad_y;
    if (iy < 0 || iy >= work.height) continue;
    const float *const row = work.x + iy * work.width + ox * S - work.pad_x;
#pragma GCC unroll 5
    for (int kx = 0; kx < K; ++kx) {
      Vec v = S == 1 ? load(row + kx) : evens(load(row + kx), load(row + kx + kLanes));
      if (Masked) v = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & inside.lanes[kx]);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const int ky = r - i * S;
        if (ky >= 0 && ky < K) sum[i] += weight[ky * K + kx] * v;
      }
    }
  }
  const int64_t plane = work.out_height * work.out_width;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const int64_t at = (oy + i) * work.out_width + ox;
    const bool whole = Whole || at + kLanes <= plane;
    const int count = whole ? kLanes : static_cast<int>(work.out_width - ox);
    if (work.residual) {
      sum[i] += whole ? load(work.residual + at) : load_some(work.residual + at, count);
    }
    const Vec v = Bounds ? at_most(at_least(sum[i], bounds[0]), bounds[1])
                         : activate(sum[i], work.activation);
    // What spills over the end of a row is overwritten: rows come in ascending order, and the
    // vectors of a row from right to left.
    if (whole) {
      store(work.y + at, v);
    } else {
      store_some(work.y + at, v, count);
    }
  }
}

template <int K, int S, int R, bool Bounds, bool Whole>
static inline __attribute__((always_inline)) void depthwise_band(const DepthwiseWork &work,
                                                                 const Vec (&weight)[K * K],
                                                                 const Vec (&bounds)[2],
                                                                 int64_t oy,
                                                                 const Inside<K> (&edges)[2]) {
  const int64_t last = (work.out_width - 1) / kLanes * kLanes;
  for (int64_t ox = last; ox >= 0; ox -= kLanes) {
    const int64_t first = ox * S - work.pad_x;
    if (first >= 0 && first + (kLanes - 1) * S + K <= work.width) {
      depthwise_rows<K, S, R, Bounds, false, Whole>(work, weight, bounds, oy, ox, edges[0]);
    } else if (ox == 0 || ox == last) {
      depthwise_rows<K, S, R, Bounds, true, Whole>(work, weight, bounds, oy, ox, edges[ox != 0]);
    } else {
      depthwise_rows<K, S, R, Bounds, true, Whole>(work, weight, bounds, oy, ox,
                                                   inside_of<K, S>(work, ox));
    }
  }
}

// The last rows of a plane.
template <int K, int S, int R, bool Bounds>
static __attribute__((noinline)) void depthwise_end(const DepthwiseWork &work,
                                                    const Vec (&weight)[K * K],
                                                    const Vec (&bounds)[2], int64_t oy,
                                                    const Inside<K> (&edges)[2]) {
  depthwise_band<K, S, R, Bounds, false>(work, weight, bounds, oy, edges);
}

// The plane of one channel; spill: how far its last vector runs over the end of a row.
template <int K, int S, bool Bounds>
static inline __attribute__((always_inline)) void depthwise_plane(const DepthwiseWork &work,
                                                                  const Vec (&bounds)[2],
                                                                  const Inside<K> (&edges)[2],
                                                                  int64_t spill) {
  Vec weight[K * K];
#pragma GCC unroll 25
  for (int i = 0; i < K * K; ++i) weight[i] = all(work.weights[i]);
  // Of a copy that nobody else sees, the compiler knows that a store of results does not change it.
  const DepthwiseWork own = work;
  int64_t oy = 0;
  for (; oy + 4 <= own.out_height; oy += 4) {
    if ((own.out_height - oy - 4) * own.out_width < spill) break;
    depthwise_band<K, S, 4, Bounds, true>(own, weight, bounds, oy, edges);
  }
  for (; oy + 4 <= work.out_height; oy += 4) {
    depthwise_end<K, S, 4, Bounds>(work, weight, bounds, oy, edges);
  }
  switch (work.out_height - oy) {
    case 3: return depthwise_end<K, S, 3, Bounds>(work, weight, bounds, oy, edges);
    case 2: return depthwise_end<K, S, 2, Bounds>(work, weight, bounds, oy, edges);
    case 1: return depthwise_end<K, S, 1, Bounds>(work, weight, bounds, oy, edges);
    default: return;
  }
}

template <int K, int S, bool Bounds>
static void depthwise_of(const DepthwiseWork &given) {
  DepthwiseWork work = given;
  const Vec bounds[2] = {all(lower_bound(work.activation)), all(upper_bound(work.activation))};
  // Most vectors lie inside the image, and of the others most are the first or the last of a row.
  const int64_t last = (work.out_width - 1) / kLanes * kLanes;
  Inside<K> edges[2] = {inside_of<K, S>(work, 0), {}};
  edges[1] = last ? inside_of<K, S>(work, last) : edges[0];
  for (int64_t i = 0; i < given.channels; ++i) {
    depthwise_plane<K, S, Bounds>(work, bounds, edges, last + kLanes - work.out_width);
    work.x += work.x_plane;
    work.y += work.y_plane;
    if (work.residual) work.residual += work.y_plane;
    work.weights += K * K;
    ++work.bias;
  }
}

template <int K, int S>
static void depthwise_by(const DepthwiseWork &work) {
  return is_bounds(work.activation) ? depthwise_of<K, S, true>(work)
                                    : depthwise_of<K, S, false>(work);
}

static void depthwise(const DepthwiseWork &work) {
  if (work.kernel == 3) return work.stride == 1 ? depthwise_by<3, 1>(work) : depthwise_by<3, 2>(work);
  return work.stride == 1 ? depthwise_by<5, 1>(work) : depthwise_by<5, 2>(work);
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
