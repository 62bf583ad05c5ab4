// A vector of floats of the instruction set that this file is compiled for.
//
// Only what the language has no operator for gets a name here. Nothing from std: a template that
// is instantiated here would be compiled with this file's instructions, and the linker might keep
// that copy for all the others.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define SECATEUR_LANES 16
#define SECATEUR_REGISTERS 32
#elif defined(__AVX2__)
#define SECATEUR_LANES 8
#define SECATEUR_REGISTERS 16
#elif defined(__aarch64__)
#define SECATEUR_LANES 4
#define SECATEUR_REGISTERS 32
#else
#define SECATEUR_LANES 4
#define SECATEUR_REGISTERS 16
#endif

namespace secateur {
namespace SECATEUR_ISA {

constexpr int kLanes = SECATEUR_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static inline Vec load(const float *p) { return *reinterpret_cast<const LooseVec *>(p); }
static inline void store(float *p, Vec v) { *reinterpret_cast<LooseVec *>(p) = v; }
static inline Vec all(float x) { return x - Vec{}; }

// Comparisons with NaN are false, so that NaN passes through both, as it does in ONNX Runtime.
static inline Vec at_least(Vec v, Vec low) { return v < low ? low : v; }
static inline Vec at_most(Vec v, Vec high) { return v > high ? high : v; }

#if SECATEUR_LANES == 16
#define SECATEUR_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECATEUR_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define SECATEUR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif SECATEUR_LANES == 8
#define SECATEUR_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SECATEUR_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define SECATEUR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#else
#define SECATEUR_LOW 0, 4, 1, 5
#define SECATEUR_HIGH 2, 6, 3, 7
#define SECATEUR_EVEN 0, 2, 4, 6
#endif

// a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
static inline Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, SECATEUR_LOW);
}
static inline Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, SECATEUR_HIGH);
}
// a0 a2 a4 ... b0 b2 b4 ...
static inline Vec evens(Vec a, Vec b) { return __builtin_shufflevector(a, b, SECATEUR_EVEN); }

// Rows become columns: interleaving row i with row i + half, log2(lanes) times.
static inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
