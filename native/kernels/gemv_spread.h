// Weights kept as bit masks and values, spread to where they stand (compiled per instruction set).
//
// A register of values is loaded and spread to the positions of its mask bits (expand); the only
// serial chain is the pointer, by a population count. bfloat16 is widened and multiplied as
// float32: rounding x to bfloat16 for a dot product instruction would cost accuracy and gain
// nothing.
//
// Where the weight is pruned the spread register holds 0, and 0 times an infinite or NaN x is NaN,
// as in dense arithmetic.
//
// The expand instructions are used on registers only: with memory operands they are microcode on
// some machines.
#pragma once

#include "gemv_types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace secateur {
namespace SECATEUR_ISA {
namespace {

#if defined(__AVX512F__)

using GemvVector = __m512;
constexpr int kGemvLanes = 16;
static inline GemvVector gemv_zero() { return _mm512_setzero_ps(); }
static inline GemvVector gemv_load(const float *x) { return _mm512_loadu_ps(x); }
static inline GemvVector gemv_fma(GemvVector a, GemvVector b, GemvVector c) {
  return _mm512_fmadd_ps(a, b, c);
}
// Halves, as _mm512_reduce_add_ps has it; that one, like every intrinsic that leaves a register
// undefined, makes GCC 12 warn of an uninitialised variable.
static inline float gemv_sum(GemvVector a) {
  alignas(64) float part[16];
  _mm512_store_ps(part, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}
typedef uint32_t GemvWords __attribute__((vector_size(64)));
typedef uint16_t GemvHalves __attribute__((vector_size(32), aligned(2), may_alias));

struct GemvFloat {
  using Value = float;
  static constexpr int vectors = 2;
  static constexpr bool paired = false;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    (void)bit;
    uint16_t low, high;
    __builtin_memcpy(&low, mask, 2);
    __builtin_memcpy(&high, mask + 2, 2);
    const Value *second = p + __builtin_popcount(low);
    w[0] = _mm512_maskz_expand_ps(low, _mm512_loadu_ps(p));
    w[1] = _mm512_maskz_expand_ps(high, _mm512_loadu_ps(second));
    p = second + __builtin_popcount(high);
  }
};

struct GemvBfloat {
  using Value = uint16_t;
  static constexpr int vectors = 2;
  static constexpr bool paired = false;
  static inline GemvVector spread(uint32_t mask, const Value *p) {
    const GemvHalves halves = *reinterpret_cast<const GemvHalves *>(p);
    const GemvWords wide = __builtin_convertvector(halves, GemvWords) << 16;
    return _mm512_castsi512_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask),
                                                         reinterpret_cast<__m512i>(wide)));
  }
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    (void)bit;
    uint16_t low, high;
    __builtin_memcpy(&low, mask, 2);
    __builtin_memcpy(&high, mask + 2, 2);
    const Value *second = p + __builtin_popcount(low);
    w[0] = spread(low, p);
    w[1] = spread(high, second);
    p = second + __builtin_popcount(high);
  }
};

// Spreads 32 words at once. Widening them is then one instruction a register if even columns go to
// one and odd columns to the other, so x is packed in that order.
struct GemvBfloatVbmi2 {
  using Value = uint16_t;
  static constexpr int vectors = 2;
  static constexpr bool paired = true;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    (void)bit;
    uint32_t bits;
    __builtin_memcpy(&bits, mask, 4);
    const __m512i packed = _mm512_loadu_si512(p);
    GemvWords words;
    // As text, because this file is compiled without VBMI2; the caller has asked the machine.
    __asm__("vpexpandw %1, %0%{%2%}%{z%}"
            : "=v"(words)
            : "v"(packed), "Yk"(static_cast<__mmask32>(bits)));
    w[0] = reinterpret_cast<GemvVector>(words << 16);
    w[1] = reinterpret_cast<GemvVector>(words & 0xffff0000u);
    p += __builtin_popcount(bits);
  }
};

#elif defined(__AVX2__)

using GemvVector = __m256;
constexpr int kGemvLanes = 8;
static inline GemvVector gemv_zero() { return _mm256_setzero_ps(); }
static inline GemvVector gemv_load(const float *x) { return _mm256_loadu_ps(x); }
static inline GemvVector gemv_fma(GemvVector a, GemvVector b, GemvVector c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline float gemv_sum(GemvVector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// For each mask byte and lane: which of the loaded values goes there; top bit: none.
struct GemvLanes {
  uint8_t lane[256][8];
  constexpr GemvLanes() : lane() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int i = 0; i < 8; ++i) {
        lane[mask][i] = static_cast<uint8_t>((mask >> i & 1) ? next++ : 0x80);
      }
    }
  }
};
static constexpr GemvLanes kGemvLaneTable;

// The same for a shuffle of bytes that puts 16-bit words into the upper halves of 32-bit lanes:
// spreads, zeroes and widens bfloat16 in one instruction. Both halves of the register see the same
// eight words.
struct GemvBytes {
  alignas(32) uint8_t byte[256][32];
  constexpr GemvBytes() : byte() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int i = 0; i < 8; ++i) {
        const bool kept = mask >> i & 1;
        byte[mask][4 * i] = byte[mask][4 * i + 1] = 0x80;
        byte[mask][4 * i + 2] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
        byte[mask][4 * i + 3] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
        next += kept;
      }
    }
  }
};
static constexpr GemvBytes kGemvByteTable;

struct GemvFloat {
  using Value = float;
  static constexpr int vectors = 1;
  static constexpr bool paired = false;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    (void)bit;
    const uint32_t bits = static_cast<uint8_t>(*mask);
    const __m256i lanes = _mm256_cvtepi8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kGemvLaneTable.lane[bits])));
    const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes);
    w[0] = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
    p += __builtin_popcount(bits);
  }
};

struct GemvBfloat {
  using Value = uint16_t;
  static constexpr int vectors = 1;
  static constexpr bool paired = false;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    (void)bit;
    const uint32_t bits = static_cast<uint8_t>(*mask);
    const __m256i twice = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m256i bytes =
        _mm256_load_si256(reinterpret_cast<const __m256i *>(kGemvByteTable.byte[bits]));
    w[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, bytes));
    p += __builtin_popcount(bits);
  }
};

#elif defined(__aarch64__)

using GemvVector = float32x4_t;
constexpr int kGemvLanes = 4;
static inline GemvVector gemv_zero() { return vdupq_n_f32(0); }
static inline GemvVector gemv_load(const float *x) { return vld1q_f32(x); }
static inline GemvVector gemv_fma(GemvVector a, GemvVector b, GemvVector c) {
  return vfmaq_f32(c, a, b);
}
static inline float gemv_sum(GemvVector a) { return vaddvq_f32(a); }

// For each mask of four bits: the bytes that make up the lanes; out of range: zero.
template <int Bytes>
struct GemvBytes {
  alignas(16) uint8_t byte[16][16];
  constexpr GemvBytes() : byte() {
    for (int mask = 0; mask < 16; ++mask) {
      int next = 0;
      for (int i = 0; i < 4; ++i) {
        const bool kept = mask >> i & 1;
        for (int b = 0; b < 4; ++b) {
          const int from = b - (4 - Bytes);
          byte[mask][4 * i + b] =
              static_cast<uint8_t>(kept && from >= 0 ? Bytes * next + from : 0xff);
        }
        next += kept;
      }
    }
  }
};
static constexpr GemvBytes<4> kGemvFloatTable;
static constexpr GemvBytes<2> kGemvBfloatTable;

struct GemvFloat {
  using Value = float;
  static constexpr int vectors = 1;
  static constexpr bool paired = false;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    const uint32_t bits = static_cast<uint8_t>(*mask) >> bit & 15;
    w[0] = vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(p)),
                                           vld1q_u8(kGemvFloatTable.byte[bits])));
    p += __builtin_popcount(bits);
  }
};

struct GemvBfloat {
  using Value = uint16_t;
  static constexpr int vectors = 1;
  static constexpr bool paired = false;
  static inline void expand(const char *mask, int bit, const Value *&p,
                            GemvVector (&w)[vectors]) {
    const uint32_t bits = static_cast<uint8_t>(*mask) >> bit & 15;
    w[0] = vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(p)),
                                           vld1q_u8(kGemvBfloatTable.byte[bits])));
    p += __builtin_popcount(bits);
  }
};

#else
#define SECATEUR_GEMV_SCALAR 1

static inline float gemv_widen(float value) { return value; }
static inline float gemv_widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

struct GemvFloat {
  using Value = float;
  static constexpr bool paired = false;
};

struct GemvBfloat {
  using Value = uint16_t;
  static constexpr bool paired = false;
};

#endif

}  // namespace
}  // namespace SECATEUR_ISA
}  // namespace secateur
