// Attention: every query's mean of the values, weighted by the softmax of its scores.
//
//   y[i] = sum over j of p[i][j] * v[j],   p[i] = softmax over j of (scale * q[i] . k[j] + mask[i][j])
//
// It is dense, but between sparse layers it is a third of what is left of a Transformer. For every head
// the keys are packed with positions side by side, the values with their sizes. kQueries queries at a
// time have all their scores in the second cache, so no softmax is put together from parts: both
// products are of kQueries rows and kWide vectors in registers.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

#if SECATEUR_REGISTERS == 32
constexpr int kQueries = 6, kWide = 4;
#else
constexpr int kQueries = 4, kWide = 2;
#endif

static inline int32_t whole_vectors(int32_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }

// Where the regions of the scratch begin, and where it ends.
struct Regions {
  int64_t values, scores, end;  // keys come first

  explicit Regions(const AttentionWork &work)
      : values(int64_t{work.size} * whole_vectors(work.keys)),
        scores(values + int64_t{work.keys} * whole_vectors(work.value_size)),
        end(scores + int64_t{kQueries} * whole_vectors(work.keys)) {}
};

static int64_t attention_scratch(const AttentionWork &work) { return Regions(work).end; }

// [keys][size] become [size][whole vectors of keys].
static void pack_keys(const AttentionWork &work, float *keys) {
  const int32_t width = whole_vectors(work.keys);
  for (int32_t j = 0; j < width; j += kLanes) {
    const int32_t count = work.keys - j < kLanes ? work.keys - j : kLanes;
    const float *const k = work.k + j * work.stride;
    for (int32_t d = 0; d < work.size; d += kLanes) {
      const int32_t found = work.size - d < kLanes ? work.size - d : kLanes;
      const Between lanes(0, found);
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < count ? lanes.load(k + i * work.stride + d) : Vec{};
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < found) store(keys + (d + i) * width + j, rows[i]);
      }
    }
  }
}

// [keys][value_size] become [keys][whole vectors].
static void pack_values(const AttentionWork &work, float *values) {
  const int32_t width = whole_vectors(work.value_size);
  for (int32_t j = 0; j < work.keys; ++j) {
    for (int32_t d = 0; d < width; d += kLanes) {
      const Between lanes(0, work.value_size - d);
      store(values + j * width + d, lanes.load(work.v + j * work.value_stride + d));
    }
  }
}

// out[r][0 .. V vectors) = sum over i below count of left[r][i] * right[i][0 .. V vectors)
template <int R, int V, typename Out>
static inline __attribute__((always_inline)) void product(const float *left, int64_t left_stride,
                                                          const float *right, int64_t right_stride,
                                                          int32_t count, Out out) {
  Vec sum[R][V] = {};
  for (int32_t i = 0; i < count; ++i) {
    Vec in[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) in[j] = load(right + i * right_stride + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec factor = all(left[r * left_stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[r][j] += factor * in[j];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) out(r, j, sum[r][j]);
  }
}

// Scores of one query are scaled and masked; returns the largest. Places behind the last key see nothing.
static inline Vec largest_of(const AttentionWork &work, const float *mask, float *scores) {
  const Vec none = all(-__builtin_inff());
  Vec most = none;
  const auto more = [](Vec a, Vec b) { return a > b ? a : b; };
  int32_t j = 0;
  for (; j + kLanes <= work.keys; j += kLanes) {
    Vec v = load(scores + j) * work.scale;
    if (mask) v += load(mask + j);
    store(scores + j, v);
    most = more(v, most);
  }
  if (j < work.keys) {
    const int rest = work.keys - j;
    Vec v = load(scores + j) * work.scale;
    if (mask) v += load_some(mask + j, rest);
    store(scores + j, none);
    store_some(scores + j, v, rest);
    most = more(load(scores + j), most);
  }
  return over_lanes(most, more);
}

// They become exp(score - largest); returns their sum. What is as good as 0 is 0.
static inline float exponentials(const AttentionWork &work, Vec largest, float *scores) {
  Vec sums = {};
  for (int32_t j = 0; j < work.keys; j += kLanes) {
    const Vec v = load(scores + j) - largest;
    const Vec e = v < -87.0f ? Vec{} : exponential_inside(v);  // no score is above the largest
    store(scores + j, e);
    sums += e;
  }
  return over_lanes(sums, [](Vec a, Vec b) { return a + b; })[0];
}

template <int R>
static void attend(const AttentionWork &work, int32_t row, const float *keys, const float *values,
                   float *scores) {
  const int32_t width = whole_vectors(work.keys), value_width = whole_vectors(work.value_size);
  const float *const q = work.q + row * work.stride;
  int32_t at = 0;
  const auto keep = [&](int r, int j, Vec v) __attribute__((always_inline)) {
    store(scores + r * width + at + j * kLanes, v);
  };
  for (; at + kWide * kLanes <= width; at += kWide * kLanes) {
    product<R, kWide>(q, work.stride, keys + at, width, work.size, keep);
  }
  for (; at < width; at += kLanes) {
    product<R, 1>(q, work.stride, keys + at, width, work.size, keep);
  }
  // Two loops: a query's exponentials wait for its largest score, and not those of all others.
  Vec largest[R];
  float parts[R];
  for (int r = 0; r < R; ++r) {
    const float *const mask = work.mask ? work.mask + (row + r) * int64_t{work.keys} : nullptr;
    largest[r] = largest_of(work, mask, scores + r * width);
  }
  for (int r = 0; r < R; ++r) {
    parts[r] = 1.0f / exponentials(work, largest[r], scores + r * width);
  }
  float *const y = work.y + row * work.value_stride;
  const auto finish = [&](int r, int j, Vec v) __attribute__((always_inline)) {
    const int32_t d = at + j * kLanes;
    store_some(y + r * work.value_stride + d, v * parts[r], work.value_size - d);
  };
  for (at = 0; at + kWide * kLanes <= value_width; at += kWide * kLanes) {
    product<R, kWide>(scores, width, values + at, value_width, work.keys, finish);
  }
  for (; at + 2 * kLanes <= value_width; at += 2 * kLanes) {
    product<R, 2>(scores, width, values + at, value_width, work.keys, finish);
  }
  for (; at < value_width; at += kLanes) {
    product<R, 1>(scores, width, values + at, value_width, work.keys, finish);
  }
}

static void attention(const AttentionWork &work) {
  const Regions regions(work);
  float *const keys = work.scratch, *const values = keys + regions.values;
  float *const scores = keys + regions.scores;
  pack_keys(work, keys);
  pack_values(work, values);
  int32_t row = 0;
  for (; row + kQueries <= work.rows; row += kQueries) {
    attend<kQueries>(work, row, keys, values, scores);
  }
  for (; row + 2 <= work.rows; row += 2) attend<2>(work, row, keys, values, scores);
  for (; row < work.rows; ++row) attend<1>(work, row, keys, values, scores);
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
