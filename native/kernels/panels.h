// Pattern panels: four rows at a time, columns grouped by which of the four rows use them.
//
//   sums[rows[i]][n] += weight * panel[where][n]   for the rows i in the pattern of the column
//
// A column that p of the four rows use is loaded once for p multiply-adds: at half sparsity 2.1
// rows share a load, at 80 % 1.4. One loop a pattern, so no bit is tested inside.
//
// A record: row_and_flags of the first row, the other three rows, 15 counts (one a pattern, 1 to
// 15: bit i stands for row i), then for each pattern its entries {where, one weight a set bit}.
// The idea is that of SpRegTiling (Wilkinson, Cheshmi and Dehnavi, PLDI 2023).
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

template <int Pattern, int V>
static inline __attribute__((always_inline)) const uint32_t *columns_of(const uint32_t *at,
                                                                        uint32_t count,
                                                                        const char *panel,
                                                                        Vec (&sum)[kPanelRows][V]) {
  constexpr int kRows = __builtin_popcount(Pattern);
  for (uint32_t k = 0; k < count; ++k, at += 1 + kRows) {
    const float *const x = reinterpret_cast<const float *>(panel + at[0]);
    Vec in[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) in[j] = load(x + j * kLanes);
    int next = 1;
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; ++i) {
      if (!(Pattern >> i & 1)) continue;
      float weight;
      memcpy(&weight, at + next++, sizeof weight);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] += weight * in[j];
    }
  }
  return at;
}

template <int V>
static void panels_of(const Work &work, int first, bool last_part) {
  const uint32_t *at = static_cast<const uint32_t *>(work.stream);
  const uint32_t *const end = static_cast<const uint32_t *>(work.stream_end);
  const char *const panel = work.panel + first * static_cast<int>(sizeof(Vec));
  const size_t width = static_cast<size_t>(work.vectors) * kLanes;
  while (at < end) {
    const uint32_t head = at[0];
    const uint32_t rows[kPanelRows] = {head & kRowMask, at[1], at[2], at[3]};
    const uint32_t *const counts = at + 4 - 1;  // counts[1] is that of pattern 1
    at += 4 + 15;
    float *sums[kPanelRows];
    Vec sum[kPanelRows][V];
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; ++i) {
      sums[i] = work.sums + size_t{rows[i] - work.first_row} * width + first * kLanes;
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        sum[i][j] = head & kFirst ? all(work.bias[rows[i]]) : load(sums[i] + j * kLanes);
      }
    }
    at = columns_of<1>(at, counts[1], panel, sum);
    at = columns_of<2>(at, counts[2], panel, sum);
    at = columns_of<3>(at, counts[3], panel, sum);
    at = columns_of<4>(at, counts[4], panel, sum);
    at = columns_of<5>(at, counts[5], panel, sum);
    at = columns_of<6>(at, counts[6], panel, sum);
    at = columns_of<7>(at, counts[7], panel, sum);
    at = columns_of<8>(at, counts[8], panel, sum);
    at = columns_of<9>(at, counts[9], panel, sum);
    at = columns_of<10>(at, counts[10], panel, sum);
    at = columns_of<11>(at, counts[11], panel, sum);
    at = columns_of<12>(at, counts[12], panel, sum);
    at = columns_of<13>(at, counts[13], panel, sum);
    at = columns_of<14>(at, counts[14], panel, sum);
    at = columns_of<15>(at, counts[15], panel, sum);
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) store(sums[i] + j * kLanes, sum[i][j]);
    }
    if (last_part && (head & kLast) && work.y) {
      for (int i = 0; i < kPanelRows; ++i) finish_row(work, rows[i], sums[i] - first * kLanes);
    }
  }
}

static void panels(const Work &work) {
#if SECATEUR_REGISTERS == 32
  constexpr int kMost = 6;
#else
  constexpr int kMost = 2;
#endif
  for (int first = 0; first < work.vectors; first += kMost) {
    const int left = work.vectors - first;
    const bool last = left <= kMost;
    switch (left < kMost ? left : kMost) {
      case 1: panels_of<1>(work, first, last); break;
#if SECATEUR_REGISTERS == 32
      case 3: panels_of<3>(work, first, last); break;
      case 4: panels_of<4>(work, first, last); break;
      case 5: panels_of<5>(work, first, last); break;
      case 6: panels_of<6>(work, first, last); break;
#endif
      default: panels_of<2>(work, first, last); break;
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
