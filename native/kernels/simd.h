// A vector of floats of the instruction set that this file is compiled for.
//
// Only what the language has no operator for gets a name here. Nothing from std: a template that
// is instantiated here would be compiled with this file's instructions, and the linker might keep
// that copy for all the others.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// Loads and stores lanes [begin, stop) alone: nothing else is read or written. Other lanes load as 0.
class Between {
 public:
#if defined(__AVX512F__)
  Between(int begin, int stop) : mask_(static_cast<__mmask16>(below(stop) & ~below(begin))) {}
  Vec load(const float *p) const { return (Vec)_mm512_maskz_loadu_ps(mask_, p); }
  void store(float *p, Vec v) const { _mm512_mask_storeu_ps(p, mask_, (__m512)v); }

 private:
  static unsigned below(int n) { return n <= 0 ? 0u : n >= kLanes ? 0xFFFFu : (1u << n) - 1; }
  __mmask16 mask_;
#else
  Between(int begin, int stop)
      : begin_(begin < 0 ? 0 : begin), stop_(stop < kLanes ? stop : kLanes) {}
#if defined(__AVX2__)
  Vec load(const float *p) const {
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Vec)_mm256_maskload_ps(p, (__m256i)((lane >= begin_) & (lane < stop_)));
  }
#else
  Vec load(const float *p) const {
    if (begin_ == 0 && stop_ == kLanes) return SECATEUR_ISA::load(p);
    Vec v = {};
    for (int i = begin_; i < stop_; ++i) v[i] = p[i];
    return v;
  }
#endif
  // Not masked: such a store takes 40 steps on some processors.
  void store(float *p, Vec v) const {
    for (int i = begin_; i < stop_; ++i) p[i] = v[i];
  }

 private:
  int begin_, stop_;
#endif
};

// Of every four lanes: lanes a and b of v, and lanes c and d of w.
#if SECATEUR_LANES == 16
#define SECATEUR_LANES_OF(v, w, a, b, c, d)                                                       \
  __builtin_shufflevector(v, w, a, b, 16 + c, 16 + d, 4 + a, 4 + b, 20 + c, 20 + d, 8 + a, 8 + b, \
                          24 + c, 24 + d, 12 + a, 12 + b, 28 + c, 28 + d)
// Four lanes are a quarter: quarters a and b of v, and quarters c and d of w.
#define SECATEUR_QUARTERS_OF(v, w, a, b, c, d)                                                   \
  __builtin_shufflevector(v, w, 4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * b + 1,        \
                          4 * b + 2, 4 * b + 3, 16 + 4 * c, 17 + 4 * c, 18 + 4 * c, 19 + 4 * c,  \
                          16 + 4 * d, 17 + 4 * d, 18 + 4 * d, 19 + 4 * d)
#elif SECATEUR_LANES == 8
#define SECATEUR_LANES_OF(v, w, a, b, c, d) \
  __builtin_shufflevector(v, w, a, b, 8 + c, 8 + d, 4 + a, 4 + b, 12 + c, 12 + d)
#else
#define SECATEUR_LANES_OF(v, w, a, b, c, d) __builtin_shufflevector(v, w, a, b, 4 + c, 4 + d)
#endif

// Four floats, each of which can be made a vector of its own: one load instead of four.
class Four {
 public:
  explicit Four(const float *p) {
    // By assembly, or the compiler would load each float again.
    typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
    const LooseQuad &four = *reinterpret_cast<const LooseQuad *>(p);
#if defined(__AVX512F__)
    __asm__("vbroadcastf32x4 %1, %0" : "=v"(four_) : "m"(four));
#elif defined(__AVX2__)
    __asm__("vbroadcastf128 %1, %0" : "=x"(four_) : "m"(four));
#else
    four_ = four;
#if defined(__x86_64__)
    __asm__("" : "+x"(four_));
#elif defined(__aarch64__)
    __asm__("" : "+w"(four_));
#endif
#endif
  }
  // i is a constant once the loop around it is unrolled.
  Vec operator[](int i) const {
    switch (i) {
      case 0: return SECATEUR_LANES_OF(four_, four_, 0, 0, 0, 0);
      case 1: return SECATEUR_LANES_OF(four_, four_, 1, 1, 1, 1);
      case 2: return SECATEUR_LANES_OF(four_, four_, 2, 2, 2, 2);
      default: return SECATEUR_LANES_OF(four_, four_, 3, 3, 3, 3);
    }
  }

 private:
  Vec four_;
};

// Comparisons with NaN are false, so that NaN passes through both, as it does in ONNX Runtime.
#if defined(__AVX512F__)
// The compiler sees what the other form means for shorter vectors only.
static inline Vec at_least(Vec v, Vec low) {
  return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)low, (__m512)v);
}
static inline Vec at_most(Vec v, Vec high) {
  return (Vec)_mm512_maskz_min_ps(0xFFFF, (__m512)high, (__m512)v);
}
#else
static inline Vec at_least(Vec v, Vec low) { return v < low ? low : v; }
static inline Vec at_most(Vec v, Vec high) { return v > high ? high : v; }
#endif

#if SECATEUR_LANES == 16
#define SECATEUR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif SECATEUR_LANES == 8
#define SECATEUR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#else
#define SECATEUR_EVEN 0, 2, 4, 6
#endif

// a0 a2 a4 ... b0 b2 b4 ...
static inline Vec evens(Vec a, Vec b) { return __builtin_shufflevector(a, b, SECATEUR_EVEN); }

// All lanes put together by an operation for which their order does not matter; every lane has the result.
template <typename Op>
static inline __attribute__((always_inline)) Vec over_lanes(Vec v, Op op) {
#if SECATEUR_LANES == 16
  v = op(v, SECATEUR_QUARTERS_OF(v, v, 2, 3, 0, 1));
  v = op(v, SECATEUR_QUARTERS_OF(v, v, 1, 0, 3, 2));
#elif SECATEUR_LANES == 8
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
  v = op(v, SECATEUR_LANES_OF(v, v, 2, 3, 0, 1));
  return op(v, SECATEUR_LANES_OF(v, v, 1, 0, 3, 2));
}

// Rows become columns. First in every four lanes, by shuffles that stay there, which are the fastest;
// then the fours change places.
static inline __attribute__((always_inline)) void transpose(Vec (&rows)[kLanes]) {
  Vec fours[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const Vec a = SECATEUR_LANES_OF(rows[i], rows[i + 1], 0, 1, 0, 1);
    const Vec b = SECATEUR_LANES_OF(rows[i], rows[i + 1], 2, 3, 2, 3);
    const Vec c = SECATEUR_LANES_OF(rows[i + 2], rows[i + 3], 0, 1, 0, 1);
    const Vec d = SECATEUR_LANES_OF(rows[i + 2], rows[i + 3], 2, 3, 2, 3);
    fours[i] = SECATEUR_LANES_OF(a, c, 0, 2, 0, 2);
    fours[i + 1] = SECATEUR_LANES_OF(a, c, 1, 3, 1, 3);
    fours[i + 2] = SECATEUR_LANES_OF(b, d, 0, 2, 0, 2);
    fours[i + 3] = SECATEUR_LANES_OF(b, d, 1, 3, 1, 3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if SECATEUR_LANES == 16
    const Vec &a = fours[i], &b = fours[4 + i], &c = fours[8 + i], &d = fours[12 + i];
    const Vec low_ab = SECATEUR_QUARTERS_OF(a, b, 0, 1, 0, 1);
    const Vec low_cd = SECATEUR_QUARTERS_OF(c, d, 0, 1, 0, 1);
    const Vec high_ab = SECATEUR_QUARTERS_OF(a, b, 2, 3, 2, 3);
    const Vec high_cd = SECATEUR_QUARTERS_OF(c, d, 2, 3, 2, 3);
    rows[i] = SECATEUR_QUARTERS_OF(low_ab, low_cd, 0, 2, 0, 2);
    rows[4 + i] = SECATEUR_QUARTERS_OF(low_ab, low_cd, 1, 3, 1, 3);
    rows[8 + i] = SECATEUR_QUARTERS_OF(high_ab, high_cd, 0, 2, 0, 2);
    rows[12 + i] = SECATEUR_QUARTERS_OF(high_ab, high_cd, 1, 3, 1, 3);
#elif SECATEUR_LANES == 8
    const Vec &a = fours[i], &b = fours[4 + i];
    rows[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    rows[4 + i] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    rows[i] = fours[i];
#endif
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
