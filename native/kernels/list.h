// Row lists: one row of weights at a time, against a tile of positions.
//
//   sums[row][n] = bias[row] + sum over the row's entries of weight * panel[where][n]
//
// A tile of V vectors holds V sums in registers for a whole record. An entry costs V multiply-adds,
// each with its own load, so a record is bound by loads, of which the processors meant here do as
// many as multiply-adds. So weights are loaded four at a time, and spread over a vector by shuffles.
// And as loads whose address is itself being loaded wait in the processor's short queue and hold up
// those behind them, which costs a fifth to a third of the rate, addresses are read eight entries
// ahead. The panel of a block of channels is to stay in the first cache; rows come sorted by how many
// entries they have, so that the end of one loop predicts the end of the next.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

// The `where`s of a block of records, a word of kWheres at a time.
class Wheres {
 public:
  explicit Wheres(const uint32_t *words) : next_(words) {
#pragma GCC unroll 4
    for (int i = 0; i < kWordsAhead; ++i) words_[i] = read();
  }
  // The next word. The one that comes kWordsAhead later is read now.
  uint64_t take() {
    const uint64_t word = words_[0];
#pragma GCC unroll 4
    for (int i = 1; i < kWordsAhead; ++i) words_[i - 1] = words_[i];
    words_[kWordsAhead - 1] = read();
    // Without this the compiler would put the read off until the word is used.
    __asm__ volatile("" : "+r"(words_[kWordsAhead - 1]));
    return word;
  }
  // Asks for those of count entries that come kAskedAhead later.
  void ask(uint32_t count) const {
    const uint16_t *const from = reinterpret_cast<const uint16_t *>(next_) + kAskedAhead;
    for (uint32_t i = 0; i < count; i += kLine / sizeof *from) __builtin_prefetch(from + i);
  }

 private:
  uint64_t read() {
    uint64_t word;
    memcpy(&word, next_, sizeof word);
    next_ += 2;
    return word;
  }

  uint64_t words_[kWordsAhead];
  const uint32_t *next_;
};

// Calls add(i, weights, where) for every entry of a record; the entry's weight is weights[i]. Up to
// three weights behind the last are read.
template <typename Weights, typename Weight, typename Add>
static inline __attribute__((always_inline)) void each_entry(Wheres &wheres, const Weight *&weight,
                                                             uint32_t count, Add add) {
  wheres.ask(count);
  for (uint32_t i = 0; i < count; i += kLine / sizeof *weight) {
    __builtin_prefetch(weight + kAskedAhead + i);
  }
  for (; count >= kWheres; count -= kWheres, weight += kWheres) {
    const uint64_t word = wheres.take();
    const Weights weights(weight);
#pragma GCC unroll 4
    for (int i = 0; i < kWheres; ++i) add(i, weights, static_cast<uint16_t>(word >> 16 * i));
  }
  if (!count) return;
  const uint64_t word = wheres.take();
  const Weights weights(weight);
  weight += count;
  add(0, weights, static_cast<uint16_t>(word));
  if (count > 1) add(1, weights, static_cast<uint16_t>(word >> 16));
  if (count > 2) add(2, weights, static_cast<uint16_t>(word >> 32));
}

// A chain of multiply-adds takes 4 cycles an entry, so few sums leave the units idle: narrow tiles
// keep two or four sets of sums, which take entries in turn.
template <int V>
static void list_of(const Work &work) {
  constexpr int kSets = V <= 3 ? 4 : 2 * V <= SECATEUR_REGISTERS / 2 ? 2 : 1;
  const Head *const end = static_cast<const Head *>(work.stream_end);
  const float *const panel = reinterpret_cast<const float *>(work.panel);
  const float *weight = static_cast<const float *>(work.weights);
  Wheres wheres(work.wheres);
  const bool direct = finishes_directly(work);
  for (const Head *head = static_cast<const Head *>(work.stream); head < end; ++head) {
    const uint32_t row = head->row_and_flags & kRowMask;
    float *const sums = work.sums + size_t{row - work.first_row} * (V * kLanes);
    Vec sum[kSets][V];
    if (head->row_and_flags & kFirst) {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] = all(work.bias[row]);
    } else {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[0][j] = load(sums + j * kLanes);
    }
#pragma GCC unroll 4
    for (int i = 1; i < kSets; ++i) {
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[i][j] = Vec{};
    }
    const auto add = [&](int i, const Four &weights, uint16_t where)
                         __attribute__((always_inline)) {
      const float *const x = panel + where;
      const Vec w = weights[i];
#pragma GCC unroll 14
      for (int j = 0; j < V; ++j) sum[i % kSets][j] += w * load(x + j * kLanes);
    };
    each_entry<Four>(wheres, weight, head->count, add);
#pragma GCC unroll 14
    for (int j = 0; j < V; ++j) {
      if (kSets == 4) sum[0][j] += sum[2 % kSets][j], sum[1 % kSets][j] += sum[3 % kSets][j];
      if (kSets > 1) sum[0][j] += sum[1 % kSets][j];
    }
    if (direct && (head->row_and_flags & kLast)) {
      finish_directly<V>(work, row, sum[0]);
      continue;
    }
#pragma GCC unroll 14
    for (int j = 0; j < V; ++j) store(sums + j * kLanes, sum[0][j]);
    if ((head->row_and_flags & kLast) && work.y) finish_row(work, row, sums);
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
