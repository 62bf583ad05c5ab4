// What the GEMV kernels are given. Plain structures: this file is included per instruction set.
#pragma once

#include <stdint.h>

namespace secateur {

// Columns that share one mask word; also the padding of a row of x.
constexpr int kGemvGroup = 64;
// Rows whose weights lie interleaved, group by group.
constexpr int kGemvRows = 4;
// Tokens that one call of a kernel takes.
constexpr int kGemvTokens = 8;
// Bytes behind the last value that a kernel may read.
constexpr int kGemvSpareBytes = 64;

// y[t * y_stride + r] = sum over the kept columns c of row r of weight(r, c) * x[t * x_stride + c],
// for every row r of the blocks from begin to end.
//
// A block is kGemvRows rows, the last one filled up with empty rows. Its masks and its values are
// each one stream: for each group of columns, for each row of the block, a word or the kept values.
struct GemvRows {
  const uint64_t *masks;  // [blocks][groups][kGemvRows]; bit c % 64 of group c / 64: c is kept
  int64_t groups;
  const void *values;
  const int64_t *starts;  // the first value of each block
  int64_t begin, end;     // blocks
  int64_t rows;           // of the matrix
  const float *x;
  int64_t columns, x_stride;
  int tokens;      // 1 to kGemvTokens
  float *scratch;  // kGemvTokens * groups * kGemvGroup floats, aligned to 64 bytes
  float *y;
  int64_t y_stride;
  bool plain;  // leave out what needs more than the instruction set's base; for tests
};

using GemvKernel = void (*)(const GemvRows &);

}  // namespace secateur
