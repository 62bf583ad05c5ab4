// Weights as the kernels read them: one stream for each part of the rows and each block of channels.
#pragma once

#include <cstdint>
#include <vector>

#include "spec.h"
#include "tiling.h"

namespace secateur {

// What is left of a first cache of 32 KB beside sums and stream.
constexpr int64_t kFirstCache = 24 * 1024;

struct Streams {
  // Where the records of a block of channels lie in the words of a part. Of lists these are the
  // heads, and the other two arrays follow.
  struct Block {
    size_t begin, end;
    size_t wheres, weights;
  };
  // Rows [first_row, first_row + rows).
  struct Part {
    int64_t first_row, rows;
    std::vector<Block> blocks;
    std::vector<uint32_t> words;
  };
  int64_t channels_of_block, blocks;
  std::vector<Part> parts;

  int64_t bytes() const;
};

// Every `where` is an offset from the begin of the packed block, and below channels_of_block *
// channel_floats values: it is computed from checked columns, never read from a file. That of a list
// counts values, and is below kMostPanel; that of panels and blocks counts bytes.
Streams lay_out(const secateur_spec &spec, const Weights &weights,
                const secateur_variant &variant, const Tiling &tiling, int parts);

}  // namespace secateur
