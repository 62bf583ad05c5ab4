// Row lists: one row of weights at a time, against a tile of positions.
//
//   sums[row][n] = bias[row] + sum over the row's entries of weight * panel[where][n]
//
// A tile of V vectors holds V sums in registers for a whole record. An entry costs one broadcast
// and V multiply-adds, each with its own load: (V + 1) / V loads a multiply-add, so a wide tile is
// bound by loads, of which the processors meant here do as many as multiply-adds. The panel of a
// block of channels is to stay in the first cache; rows come sorted by how many entries they have,
// so that the end of one loop predicts the end of the next.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

// The head of the record at `at`, which then points to its first entry.
static inline Head take_head(const Entry *&at) {
  Head head;
  memcpy(&head, at++, sizeof head);
  return head;
}

// A chain of multiply-adds takes 4 cycles an entry, so few sums leave the units idle: narrow tiles
// keep two sets of sums and take entries in turn.
template <int V>
static void list_of(const Work &work) {
  constexpr int kSets = V <= 4 ? 2 : 1;
  const Entry *at = static_cast<const Entry *>(work.stream);
  const Entry *const end = static_cast<const Entry *>(work.stream_end);
  const char *const panel = work.panel;
  const bool direct = finishes_directly(work);
  while (at < end) {
    const Head head = take_head(at);
    const uint32_t row = head.row_and_flags & kRowMask;
    float *const sums = work.sums + size_t{row - work.first_row} * (V * kLanes);
    Vec sum[kSets][V];
    if (head.row_and_flags & kFirst) {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] = all(work.bias[row]);
    } else {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] = load(sums + j * kLanes);
    }
    if (kSets == 2) {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[kSets - 1][j] = Vec{};
    }
    const Entry *const stop = at + head.count;
    if (kSets == 2) {
      for (; at + 1 < stop; at += 2) {
        const float *const x0 = reinterpret_cast<const float *>(panel + at[0].where);
        const float *const x1 = reinterpret_cast<const float *>(panel + at[1].where);
#pragma GCC unroll 14
        for (int j = 0; j < V; ++j) {
          sum[0][j] += at[0].weight * load(x0 + j * kLanes);
          sum[kSets - 1][j] += at[1].weight * load(x1 + j * kLanes);
        }
      }
    }
    for (; at < stop; ++at) {
      const float *const x = reinterpret_cast<const float *>(panel + at->where);
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] += at->weight * load(x + j * kLanes);
    }
    if (kSets == 2) {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] += sum[kSets - 1][j];
    }
    if (direct && (head.row_and_flags & kLast)) {
      finish_directly<V>(work, row, sum[0]);
      continue;
    }
#pragma GCC unroll 14
    for (int j = 0; j < V; ++j) store(sums + j * kLanes, sum[0][j]);
    if ((head.row_and_flags & kLast) && work.y) finish_row(work, row, sums);
  }
}

static void list(const Work &work) {
  switch (work.vectors) {
    case 1: return list_of<1>(work);
    case 2: return list_of<2>(work);
    case 3: return list_of<3>(work);
    case 4: return list_of<4>(work);
    case 5: return list_of<5>(work);
    case 6: return list_of<6>(work);
    case 7: return list_of<7>(work);
    case 8: return list_of<8>(work);
    case 9: return list_of<9>(work);
    case 10: return list_of<10>(work);
    case 11: return list_of<11>(work);
    case 12: return list_of<12>(work);
    case 13: return list_of<13>(work);
    default: return list_of<14>(work);
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
