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
  // Rows [first_row, first_row + rows), and where the words of each block of channels begin.
  struct Part {
    int64_t first_row, rows;
    std::vector<size_t> begins;  // one more than blocks
    std::vector<uint32_t> words;
  };
  int64_t channels_of_block, blocks;
  std::vector<Part> parts;

  int64_t bytes() const;
};

// Every `where` is in bytes from the begin of the packed block, and below channels_of_block *
// channel_floats values: it is computed from checked columns, never read from a file.
Streams lay_out(const secateur_spec &spec, const Weights &weights,
                const secateur_variant &variant, const Tiling &tiling, int parts);

}  // namespace secateur
