// How the positions of an output are cut into tiles, and what of the input a tile needs.
#pragma once

#include <cstdint>
#include <vector>

#include "spec.h"

namespace secateur {

// A tap of a kernel k at stride s reads row (output row) * s + k * dilation - pad. With
// k * dilation = q * s + phase, that is row (output row + q) of the image's phase: after cutting the
// image into phases, every tap is a shift. Or every tap has a phase of its own, a copy of the image
// that is shifted already.
struct Tiling {
  // Whether the input can be taken as it is: a kernel of one pixel, at every place.
  static bool takes_plain(const secateur_spec &spec);

  // Cuts an output of oh x ow (tokens: 1 x tokens) into tiles of at most so many vectors.
  Tiling(const secateur_spec &spec, int64_t height, int64_t width, int most_vectors, int lanes);

  bool plain;  // takes_plain; then the tiles cut the whole plane, not its rows
  // Whether every column (row) of the kernel reads a copy of the image of its own, shifted to its
  // place. With copies of columns all vectors start where vectors may.
  bool copies_x = false, copies_y = false;
  int64_t out_height, out_width;
  int64_t rows, cols;             // of the output in a tile; plain: 1 and a number of positions
  int64_t tiles_down, tiles_across;
  int vectors;                    // width of a tile
  int32_t panel_rows, panel_cols; // of one phase of a channel, packed
  std::vector<int32_t> phases;    // pairs y, x of those that some tap uses
  int64_t channel_floats;         // of a packed channel

  int64_t tiles() const { return tiles_down * tiles_across; }
  // Floats from the begin of a packed channel to what a tap adds to the tile's first position.
  int64_t shift(const secateur_spec &spec, int ky, int kx) const;

 private:
  struct Tap {
    int32_t phase[2];
    int down, across;  // the shift, in rows and columns
  };

  Tap tap(const secateur_spec &spec, int ky, int kx) const;
  void cut(const secateur_spec &spec, int64_t most, int lanes);
};

}  // namespace secateur
