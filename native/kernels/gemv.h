// Matrix times a few vectors, weights as bit masks and values (compiled per instruction set).
//
// Definition, for one row and one token:
//
//   sum = 0
//   for c in columns:  if mask bit c:  sum += *value++ * x[c]
//
// The kernel streams the weights once from memory, at 1/8 byte a column and 2 or 4 a kept weight,
// so it has to be faster than memory and no faster. Several rows are taken together, so that x,
// which lives in the second level cache, is loaded once for all of them.
#pragma once

#include "gemv_spread.h"

namespace secateur {
namespace SECATEUR_ISA {
namespace {

// How many bytes of values are asked for ahead of their use. One line a row and group is what half
// of the weights in bfloat16 take. Without: 1.3 to 1.4 times the time (Zen 4); 1024 to 8192: alike.
constexpr int kGemvAhead = 2048;

// x as [groups][tokens][64], filled up with zeros to whole groups and to `padded` tokens; in
// pairs: of 32 columns, first the even ones. One token in plain order is used where it lies.
static inline const float *gemv_pack(const GemvRows &task, int padded, bool paired) {
  if (task.tokens == 1 && padded == 1 && !paired && task.columns % kGemvGroup == 0) return task.x;
  float *out = task.scratch;
  for (int64_t g = 0; g < task.groups; ++g) {
    const int64_t left = task.columns - g * kGemvGroup;
    const int width = static_cast<int>(left < kGemvGroup ? left : kGemvGroup);
    for (int t = 0; t < padded; ++t, out += kGemvGroup) {
      float row[kGemvGroup] = {};
      if (t < task.tokens) {
        __builtin_memcpy(row, task.x + t * task.x_stride + g * kGemvGroup, sizeof(float) * width);
      }
      if (!paired) {
        __builtin_memcpy(out, row, sizeof row);
        continue;
      }
      for (int half = 0; half < kGemvGroup; half += 32) {
        for (int i = 0; i < 16; ++i) {
          out[half + i] = row[half + 2 * i];
          out[half + 16 + i] = row[half + 2 * i + 1];
        }
      }
    }
  }
  return task.scratch;
}

static inline const char *gemv_words(const GemvRows &task, int64_t block) {
  return reinterpret_cast<const char *>(task.masks + block * task.groups * kGemvRows);
}

static inline uint64_t gemv_mask(const char *masks, int row) {
  uint64_t mask;
  __builtin_memcpy(&mask, masks + row * 8, sizeof mask);
  return mask;
}

// The sums of N rows of a block from `first` on, for T tokens (of which task.tokens are wanted).
template <typename Weight, int N, int T>
static inline void gemv_some(const GemvRows &task, const float *packed, int64_t block, int first) {
  using Value = typename Weight::Value;
  const Value *p = static_cast<const Value *>(task.values) + task.starts[block];
  const char *masks = gemv_words(task, block);
  const float *x = packed;
#ifdef SECATEUR_GEMV_SCALAR
  float sum[N][T] = {};
#else
  constexpr int width = kGemvLanes * Weight::vectors;
  GemvVector acc[N][T];
  for (int r = 0; r < N; ++r) {
    for (int t = 0; t < T; ++t) acc[r][t] = gemv_zero();
  }
#endif
  for (int64_t g = 0; g < task.groups; ++g, x += T * kGemvGroup, masks += 8 * kGemvRows) {
    const Value *q[kGemvRows];
    __builtin_prefetch(masks + kGemvAhead / 4);
    for (int r = 0; r < kGemvRows; ++r) {
      q[r] = p;
      p += __builtin_popcountll(gemv_mask(masks, r));
      const char *later = reinterpret_cast<const char *>(q[r]) + kGemvAhead;
      __builtin_prefetch(later);
      if (sizeof(Value) == 4) __builtin_prefetch(later + 64);
    }
#ifdef SECATEUR_GEMV_SCALAR
    for (int r = 0; r < N; ++r) {
      const Value *value = q[first + r];
      for (uint64_t m = gemv_mask(masks, first + r); m; m &= m - 1) {
        const float w = gemv_widen(*value++);
        const int column = __builtin_ctzll(m);
        for (int t = 0; t < T; ++t) sum[r][t] += w * x[t * kGemvGroup + column];
      }
    }
#else
#pragma GCC unroll 8
    for (int i = 0; i < kGemvGroup; i += width) {
      GemvVector w[N][Weight::vectors];
      for (int r = 0; r < N; ++r) {
        Weight::expand(masks + (first + r) * 8 + i / 8, i % 8, q[first + r], w[r]);
      }
      for (int v = 0; v < Weight::vectors; ++v) {
        for (int t = 0; t < T; ++t) {
          const GemvVector xs = gemv_load(x + t * kGemvGroup + i + v * kGemvLanes);
          for (int r = 0; r < N; ++r) acc[r][t] = gemv_fma(w[r][v], xs, acc[r][t]);
        }
      }
    }
#endif
  }
  for (int r = 0; r < N; ++r) {
    const int64_t row = block * kGemvRows + first + r;
    if (row >= task.rows) return;
    for (int t = 0; t < T && t < task.tokens; ++t) {
#ifdef SECATEUR_GEMV_SCALAR
      task.y[t * task.y_stride + row] = sum[r][t];
#else
      task.y[t * task.y_stride + row] = gemv_sum(acc[r][t]);
#endif
    }
  }
}

template <typename Weight, int N, int T>
static void gemv_all(const GemvRows &task) {
  const float *packed = gemv_pack(task, T, Weight::paired);
  for (int64_t block = task.begin; block < task.end; ++block) {
#pragma GCC unroll 4
    for (int first = 0; first < kGemvRows; first += N) {
      gemv_some<Weight, N, T>(task, packed, block, first);
    }
  }
}

// Rows times tokens are accumulators in registers, 16 of 32 or 8 of 16. Where that is less than a
// block, the block is gone through again, in the cache. Three tokens run as four, five to seven as
// eight: the weights' way from memory is the same.
template <typename Weight>
static void gemv_tokens(const GemvRows &task) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int four = 4, eight = 2;
#else
  constexpr int four = 2, eight = 1;
#endif
  if (task.tokens == 1) return gemv_all<Weight, 4, 1>(task);
  if (task.tokens == 2) return gemv_all<Weight, 4, 2>(task);
  if (task.tokens <= 4) return gemv_all<Weight, four, 4>(task);
  return gemv_all<Weight, eight, 8>(task);
}

static void gemv_f32(const GemvRows &task) { gemv_tokens<GemvFloat>(task); }

static void gemv_bf16(const GemvRows &task) {
#ifdef __AVX512F__
  if (!task.plain && __builtin_cpu_supports("avx512vbmi2")) {
    return gemv_tokens<GemvBfloatVbmi2>(task);
  }
#endif
  gemv_tokens<GemvBfloat>(task);
}

}  // namespace
}  // namespace SECATEUR_ISA
}  // namespace secateur
