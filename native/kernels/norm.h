// Layer normalisation of tokens, in place.
//
//   y = (y - mean) / sqrt(variance + epsilon) * scale + shift, with mean and variance of a token's features
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

// As Between, with all lanes.
struct Whole {
  Vec load(const float *p) const { return SECATEUR_ISA::load(p); }
  void store(float *p, Vec v) const { SECATEUR_ISA::store(p, v); }
};

// Calls each(from, lanes) for every vector of so many features; the last one may have only some lanes.
template <typename Each>
static inline __attribute__((always_inline)) void each_vector(int64_t features, Each each) {
  int64_t i = 0;
  for (; i + kLanes <= features; i += kLanes) each(i, Whole());
  if (i < features) each(i, Between(0, static_cast<int>(features - i)));
}

static void normalise(const NormWork &work) {
  const auto add = [](Vec a, Vec b) { return a + b; };
  float ones[kLanes];
  store(ones, all(1.0f));
  const float share = 1.0f / static_cast<float>(work.features);
  float *y = work.y;
  for (int64_t token = 0; token < work.tokens; ++token, y += work.features) {
    Vec sum = {}, squares = {};
    each_vector(work.features, [&](int64_t i, auto lanes) { sum += lanes.load(y + i); });
    const Vec mean = over_lanes(sum, add) * share;
    each_vector(work.features, [&](int64_t i, auto lanes) {
      const Vec far = (lanes.load(y + i) - mean) * lanes.load(ones);
      squares += far * far;
    });
    const float variance = over_lanes(squares, add)[0] * share;
    const Vec factor = all(1.0f / __builtin_sqrtf(variance + work.epsilon));
    each_vector(work.features, [&](int64_t i, auto lanes) {
      const Vec v = (lanes.load(y + i) - mean) * factor * lanes.load(work.scale + i);
      lanes.store(y + i, v + lanes.load(work.shift + i));
    });
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
