// Activations on vectors. Formulas are those of the ONNX operators.
#pragma once

#include "simd.h"
#include "table.h"

namespace secateur {
namespace SECATEUR_ISA {

// e^v by 2^n * e^r with |r| <= ln 2 / 2; a polynomial of degree 6 for e^r. Within 2 ulp; below -87
// the result is about 1e-38, which no use here can tell from 0.
static inline Vec exponential(Vec v) {
  v = at_most(at_least(v, all(-87.0f)), all(88.0f));
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

static inline Vec sigmoid(Vec v) { return 1.0f / (1.0f + exponential(-v)); }

// erf(x) = x * P(x^2) below 1 (P fitted by least squares of the relative error: 1.8e-7), and
// 1 - e^(-x^2) * Q(1 / (1 + 0.33 x)) above (Abramowitz and Stegun 7.1.26: 1.5e-7).
static inline Vec error_function(Vec v) {
  const Vec x = v < 0.0f ? -v : v;
  const Vec s = x * x;
  Vec p = all(7.847259257687256e-05f);
  p = p * s - 0.0008008189033716917f;
  p = p * s + 0.005188099108636379f;
  p = p * s - 0.026853691786527634f;
  p = p * s + 0.1128358244895935f;
  p = p * s - 0.3761262595653534f;
  p = p * s + 1.1283791065216064f;
  const Vec near = x * p;
  const Vec t = 1.0f / (1.0f + 0.3275911f * x);
  Vec q = all(1.061405429f);
  q = q * t - 1.453152027f;
  q = q * t + 1.421413741f;
  q = q * t - 0.284496736f;
  q = q * t + 0.254829592f;
  const Vec far = 1.0f - q * t * exponential(-s);
  const Vec size = x < 1.0f ? near : far;
  return v < 0.0f ? -size : size;
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

}  // namespace SECATEUR_ISA
}  // namespace secateur
