// Depthwise convolutions: every output channel sees one input channel, and all its taps.
//
//   y[oy][ox] = bias + sum over ky, kx of w[ky][kx] * x[oy * S + ky - pad][ox * S + kx - pad]
//
// Depthwise layers are seldom pruned, but between sparse layers the dense runtime would change the
// layout of all activations for them and back again. R rows of the output are made at a time: they
// share the rows of the input, so that R = 4 rows of a 3 x 3 kernel need 18 loads for 36
// multiply-adds. What lies left and right of the image is masked, not padded: nothing is copied.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

template <int K, int S, int R, bool Bounds>
static inline void depthwise_rows(const DepthwiseWork &work, const Vec (&weight)[K * K], int64_t oy,
                                  int64_t ox) {
  IntVec lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  IntVec inside[K];
#pragma GCC unroll 5
  for (int kx = 0; kx < K; ++kx) {
    const int32_t first = static_cast<int32_t>(ox * S + kx - work.pad_x);
    const IntVec column = lane * S + first;
    inside[kx] = (column >= 0) & (column < static_cast<int32_t>(work.width));
  }
  Vec sum[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i] = all(work.bias);
#pragma GCC unroll 11
  for (int r = 0; r < (R - 1) * S + K; ++r) {
    const int64_t iy = oy * S + r - work.pad_y;
    if (iy < 0 || iy >= work.height) continue;
    const float *const row = work.x + iy * work.width + ox * S - work.pad_x;
#pragma GCC unroll 5
    for (int kx = 0; kx < K; ++kx) {
      Vec v = S == 1 ? load(row + kx) : evens(load(row + kx), load(row + kx + kLanes));
      v = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & inside[kx]);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const int ky = r - i * S;
        if (ky >= 0 && ky < K) sum[i] += weight[ky * K + kx] * v;
      }
    }
  }
  const Vec low = all(lower_bound(work.activation)), high = all(upper_bound(work.activation));
  const int64_t plane = work.out_height * work.out_width;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const int64_t at = (oy + i) * work.out_width + ox;
    const int64_t left = work.out_width - ox;
    const int count = left < kLanes ? static_cast<int>(left) : kLanes;
    if (work.residual) {
      sum[i] += count == kLanes ? load(work.residual + at) : load_some(work.residual + at, count);
    }
    const Vec v = Bounds ? at_most(at_least(sum[i], low), high) : activate(sum[i], work.activation);
    // What spills over the end of a row is overwritten: rows come in ascending order, and the
    // vectors of a row from right to left.
    if (at + kLanes <= plane) {
      store(work.y + at, v);
    } else {
      store_some(work.y + at, v, count);
    }
  }
}

template <int K, int S, int R, bool Bounds>
static inline void depthwise_band(const DepthwiseWork &work, const Vec (&weight)[K * K],
                                  int64_t oy) {
  for (int64_t ox = (work.out_width - 1) / kLanes * kLanes; ox >= 0; ox -= kLanes) {
    depthwise_rows<K, S, R, Bounds>(work, weight, oy, ox);
  }
}

template <int K, int S, bool Bounds>
static void depthwise_of(const DepthwiseWork &work) {
  Vec weight[K * K];
  for (int i = 0; i < K * K; ++i) weight[i] = all(work.weights[i]);
  int64_t oy = 0;
  for (; oy + 4 <= work.out_height; oy += 4) depthwise_band<K, S, 4, Bounds>(work, weight, oy);
  switch (work.out_height - oy) {
    case 3: return depthwise_band<K, S, 3, Bounds>(work, weight, oy);
    case 2: return depthwise_band<K, S, 2, Bounds>(work, weight, oy);
    case 1: return depthwise_band<K, S, 1, Bounds>(work, weight, oy);
    default: return;
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
