// Row lists in half precision: float16 weights and activations, sums in float32.
//
//   sums[row][n] += float( sum over the record's entries of half(weight) * half(panel[where][n]) )
//
// A vector holds twice as many positions, and a panel half the bytes. Only the entries of one record
// (one row in one block of channels, some tens of terms) are summed in float16; records are added
// in float32. So an error is that of a short sum: about (terms + 3) * 2^-11 of the sum of |w x|.
// Only where the machine multiplies float16: AVX512-FP16, and Armv8.2 with FP16. (SECATEUR_SLOW_HALF,
// for tests, compiles it for other machines, where every product is a call.)
#pragma once

#include "list.h"

#if defined(__AVX512FP16__) || defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC) || \
    defined(SECATEUR_SLOW_HALF)
#define SECATEUR_HAS_HALF 1

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace secateur {
namespace SECATEUR_ISA {

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC knows _Float16 in C++ from version 13 on
#else
typedef _Float16 Half;
#endif

// As many halves as two vectors of floats: tiles have an even number of vectors.
typedef Half HalfVec __attribute__((vector_size(kLanes * 4)));
typedef Half LooseHalfVec __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef Half NarrowVec __attribute__((vector_size(kLanes * 2)));
typedef Half LooseNarrowVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

static inline HalfVec all_of(Half half) {
#if defined(__aarch64__)
  return vdupq_n_f16(half);
#else
  return half - HalfVec{};
#endif
}

template <int V>  // vectors of halves
static void half_list_of(const Work &work) {
  constexpr int kSets = V <= 4 ? 2 : 1;
  const Head *const end = static_cast<const Head *>(work.stream_end);
  const Half *const panel = reinterpret_cast<const Half *>(work.panel);
  const Half *weight = static_cast<const Half *>(work.weights);
  Wheres wheres(work.wheres);
  for (const Head *head = static_cast<const Head *>(work.stream); head < end; ++head) {
    const uint32_t row = head->row_and_flags & kRowMask;
    float *const sums = work.sums + size_t{row - work.first_row} * (2 * V * kLanes);
    HalfVec sum[kSets][V] = {};
    const auto add = [&](int i, const Half *weights, uint16_t where)
                         __attribute__((always_inline)) {
      const LooseHalfVec *const x = reinterpret_cast<const LooseHalfVec *>(panel + where);
      const HalfVec all_w = all_of(weights[i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i % kSets][j] += all_w * x[j];
    };
    each_entry<const Half *>(wheres, weight, head->count, add);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      if (kSets == 2) sum[0][j] += sum[kSets - 1][j];
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        NarrowVec narrow;
        memcpy(&narrow, reinterpret_cast<const char *>(&sum[0][j]) + part * sizeof narrow,
               sizeof narrow);
        float *const to = sums + (2 * j + part) * kLanes;
        const Vec before = head->row_and_flags & kFirst ? all(work.bias[row]) : load(to);
        store(to, before + __builtin_convertvector(narrow, Vec));
      }
    }
    if ((head->row_and_flags & kLast) && work.y) finish_row(work, row, sums);
  }
}

static void half_list(const Work &work) {
  switch (work.vectors / 2) {
    case 1: return half_list_of<1>(work);
    case 2: return half_list_of<2>(work);
    case 3: return half_list_of<3>(work);
    case 4: return half_list_of<4>(work);
    case 5: return half_list_of<5>(work);
    case 6: return half_list_of<6>(work);
    default: return half_list_of<7>(work);
  }
}

// A panel of floats becomes one of halves, in another place.
static void halve(const float *from, int64_t count, void *to) {
  Half *const half = static_cast<Half *>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    *reinterpret_cast<LooseNarrowVec *>(half + i) =
        __builtin_convertvector(load(from + i), NarrowVec);
  }
  for (; i < count; ++i) half[i] = static_cast<Half>(from[i]);
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
#endif
