// Activations on vectors. Formulas are those of the ONNX operators.
#pragma once

#include "simd.h"
#include "table.h"

namespace secateur {
namespace SECATEUR_ISA {

// e^v by 2^n * e^r with |r| <= ln 2 / 2; a polynomial of degree 6 for e^r. Within 2 ulp from -87 to
// 88; outside it is anything.
static inline Vec exponential_inside(Vec v) {
  const Vec round = all(12582912.0f);  // 1.5 * 2^23: adding it leaves a whole number in the mantissa
  const Vec shifted = v * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = all(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

// What lies outside is taken for the nearer end.
static inline Vec exponential(Vec v) {
  return exponential_inside(at_most(at_least(v, all(-87.0f)), all(88.0f)));
}

// Exactly 0 far below 0: a large v is multiplied by it.
static inline Vec sigmoid(Vec v) {
  const Vec inside = 1.0f / (1.0f + exponential(-v));
  return v < -88.0f ? Vec{} : inside;
}

// erf(x) = x * P(x^2) / Q(x^2) up to 3.95, where it is 1 to within half a unit in the last place.
// P and Q, both of degree 5, are fitted to the relative error: 2e-8 before rounding. From there on
// it is exactly 1: what GELU leaves of a large negative number is multiplied by that number.
static inline Vec error_function(Vec v) {
  const Vec x = at_most(at_least(v, all(-3.95f)), all(3.95f));
  const Vec s = x * x;
  Vec p = all(2.0260727069398854e-06f);
  p = p * s + 0.00028467189986258745f;
  p = p * s + 0.0038073642645031214f;
  p = p * s + 0.05287295952439308f;
  p = p * s + 0.19153140485286713f;
  p = p * s + 1.1283791065216064f;
  Vec q = all(3.783269858104177e-05f);
  q = q * s + 0.0011705372016876936f;
  q = q * s + 0.015053479000926018f;
  q = q * s + 0.11455182731151581f;
  q = q * s + 0.50307297706604f;
  q = q * s + 1.0f;
  const Vec inside = x * p / q;
  return v < -3.95f ? all(-1.0f) : v > 3.95f ? all(1.0f) : inside;
}

// None, ReLU and clip are but two bounds.
static inline bool is_bounds(const Activation &how) { return how.kind <= 2; }
static inline float lower_bound(const Activation &how) {
  return how.kind == 0 ? -__builtin_inff() : how.kind == 1 ? 0.0f : how.alpha;
}
static inline float upper_bound(const Activation &how) {
  return how.kind == 2 ? how.beta : __builtin_inff();
}

static inline Vec activate(Vec v, const Activation &how) {
  switch (how.kind) {
    case 1:
      return at_least(v, Vec{});
    case 2:
      return at_most(at_least(v, all(how.alpha)), all(how.beta));
    case 3:
      return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
    case 4:
      return v * sigmoid(v);
    case 5:
      return v * at_most(at_least(v * (1.0f / 6.0f) + 0.5f, Vec{}), all(1.0f));
    default:
      return v;
  }
}

// Calls run with an activation's kind as a type, so that it is known in loops.
template <int Value>
struct Kind {
  static constexpr int value = Value;
};
template <typename Run>
static inline __attribute__((always_inline)) void with_kind(const Activation &how, Run run) {
  switch (how.kind) {
    case 1: return run(Kind<1>());
    case 2: return run(Kind<2>());
    case 3: return run(Kind<3>());
    case 4: return run(Kind<4>());
    case 5: return run(Kind<5>());
    default: return run(Kind<0>());
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
