// Some rows of an image, in all its channels: what a layer of a chain reads and writes at a time.
#pragma once

#include <cstdint>

namespace secateur {

struct Band {
  const float *x;            // the first row of the first channel
  const float *begin, *end;  // what may be read around it
  int64_t x_plane;           // floats from one channel to the next
  int64_t height, width;     // rows and columns of x
  int32_t pad_y;             // rows of padding above them
  const float *residual;     // lies as y does; or null
  float *y;
  int64_t y_plane;
  int64_t out_height, out_width;
};

}  // namespace secateur
