// Blocks: R neighbouring rows that use the same columns, so one load serves R rows.
//
//   sums[row + i][n] += weights[i] * panel[where][n]   for i below R
//
// R * V sums stay in registers. An entry is {where, R weights}: (V + R) loads for R * V
// multiply-adds, so from 4 x 4 on the multiply-adds are the limit.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

template <int R, int V>
static void blocks_of(const Work &work, int first, bool last_part) {
  const uint32_t *at = static_cast<const uint32_t *>(work.stream);
  const uint32_t *const end = static_cast<const uint32_t *>(work.stream_end);
  const char *const panel = work.panel + first * static_cast<int>(sizeof(Vec));
  const size_t width = static_cast<size_t>(work.vectors) * kLanes;
  while (at < end) {
    const uint32_t head = at[0], count = at[1];
    at += 2;
    const uint32_t row = head & kRowMask;
    float *const sums = work.sums + size_t{row - work.first_row} * width + first * kLanes;
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        sum[i][j] = head & kFirst ? all(work.bias[row + i]) : load(sums + i * width + j * kLanes);
      }
    }
    for (uint32_t k = 0; k < count; ++k, at += 1 + R) {
      const float *const x = reinterpret_cast<const float *>(panel + at[0]);
      const float *const weights = reinterpret_cast<const float *>(at + 1);
      Vec in[V];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) in[j] = load(x + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        float weight;
        memcpy(&weight, weights + i, sizeof weight);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] += weight * in[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) store(sums + i * width + j * kLanes, sum[i][j]);
    }
    if (last_part && (head & kLast) && work.y) {
      for (int i = 0; i < R; ++i) finish_row(work, row + i, sums - first * kLanes + i * width);
    }
  }
}

// A tile is cut into parts of at most Most vectors; the last part of a row sees it finished.
template <int R, int Most>
static void blocks_by(const Work &work) {
  for (int first = 0; first < work.vectors; first += Most) {
    const int left = work.vectors - first;
    const bool last = left <= Most;
    switch (left < Most ? left : Most) {
      case 1: blocks_of<R, 1>(work, first, last); break;
      case 2: blocks_of<R, Most < 2 ? Most : 2>(work, first, last); break;
      case 3: blocks_of<R, Most < 3 ? Most : 3>(work, first, last); break;
      case 4: blocks_of<R, Most < 4 ? Most : 4>(work, first, last); break;
      case 5: blocks_of<R, Most < 5 ? Most : 5>(work, first, last); break;
      default: blocks_of<R, Most < 6 ? Most : 6>(work, first, last); break;
    }
  }
}

static void blocks(const Work &work) {
#if SECATEUR_REGISTERS == 32
  if (work.rows == 4) return blocks_by<4, 6>(work);
  if (work.rows == 8) return blocks_by<8, 3>(work);
  return blocks_by<16, 1>(work);
#else
  if (work.rows == 4) return blocks_by<4, 3>(work);
  if (work.rows == 8) return blocks_by<8, 1>(work);
  return blocks_by<16, 1>(work);
#endif
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
