#include "tiling.h"

#include <algorithm>

#include "../kernels/table.h"

namespace secateur {
namespace {

// Copies pay if the tiles then have at most so many times as many vectors.
constexpr double kCopiesPay = 1.2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t extent(const secateur_spec &spec, int axis, int64_t size) {
  if (size < 1) {
    throw Error(SECATEUR_INVALID,
                "sparse convolutions take images of at least one row and one column");
  }
  const int64_t reach = int64_t{spec.dilation[axis]} * (spec.kernel[axis] - 1) + 1;
  const int64_t padded = size + spec.pads[axis] + spec.pads[axis + 2];
  if (padded < reach) {
    throw Error(SECATEUR_INVALID, "an input of " + std::to_string(size) + " with padding " +
                                      std::to_string(spec.pads[axis]) + " and " +
                                      std::to_string(spec.pads[axis + 2]) +
                                      " is smaller than the kernel, which reaches over " +
                                      std::to_string(reach));
  }
  return (padded - reach) / spec.stride[axis] + 1;
}

}  // namespace

bool Tiling::takes_plain(const secateur_spec &spec) {
  return spec.kind == SECATEUR_LINEAR ||
         (spec.kernel[0] == 1 && spec.kernel[1] == 1 && spec.stride[0] == 1 &&
          spec.stride[1] == 1 && !spec.pads[0] && !spec.pads[1] && !spec.pads[2] && !spec.pads[3]);
}

Tiling::Tiling(const secateur_spec &spec, int64_t height, int64_t width, int most_vectors,
               int lanes) {
  const bool linear = spec.kind == SECATEUR_LINEAR;
  plain = takes_plain(spec);
  out_height = linear ? 1 : extent(spec, 0, height);
  out_width = linear ? width : extent(spec, 1, width);
  if (plain) {
    const int64_t positions = linear ? width : height * width;
    const int64_t all = ceil_div(positions, lanes);
    tiles_down = 1;
    tiles_across = ceil_div(all, most_vectors);
    vectors = static_cast<int>(ceil_div(all, tiles_across));  // tiles of one size
    rows = 1;
    cols = int64_t{vectors} * lanes;
    tiles_across = ceil_div(positions, cols);
    panel_rows = 1;
    panel_cols = static_cast<int32_t>(cols);
    phases = {0, 0};
    channel_floats = cols;
    return;
  }
  const int64_t most = int64_t{most_vectors} * lanes;
  const Tiling start = *this;
  Tiling copied = *this;
  copied.copies_x = true;
  cut(spec, most, lanes);
  copied.cut(spec, most, lanes);
  // A vector of 16 floats that starts anywhere lies in two cache lines nearly always, and takes two
  // loads; one of 4 seldom does.
  const bool pays = lanes >= 8 && spec.kernel[1] > 1 &&
                    copied.tiles() * copied.vectors <= kCopiesPay * tiles() * vectors;
  if (pays || channel_floats > kMostPanel) *this = copied;
  if (channel_floats > kMostPanel) {  // a dilation of hundreds; copies do not grow with it
    *this = start;
    copies_x = copies_y = true;
    cut(spec, most, lanes);
  }
}

void Tiling::cut(const secateur_spec &spec, int64_t most, int lanes) {
  int shift_y = 0, shift_x = 0;
  for (int ky = 0; ky < spec.kernel[0]; ++ky) {
    for (int kx = 0; kx < spec.kernel[1]; ++kx) {
      const Tap tap = this->tap(spec, ky, kx);
      shift_y = std::max(shift_y, tap.down);
      shift_x = std::max(shift_x, tap.across);
      bool known = false;
      for (size_t i = 0; i < phases.size(); i += 2) {
        known |= phases[i] == tap.phase[0] && phases[i + 1] == tap.phase[1];
      }
      if (!known) phases.insert(phases.end(), tap.phase, tap.phase + 2);
    }
  }
  // Rows lie side by side in a tile, each with the columns that the taps reach into; the last row
  // needs none. Where not even one row fits, a tile is a part of a row.
  // Two short rows share a vector: of a kernel's rows every second one begins in its middle.
  const int64_t unit = 2 * out_width <= lanes ? lanes / 2 : lanes;
  const int64_t row = copies_x ? ceil_div(out_width, unit) * unit : out_width + shift_x;
  if (out_width > most) {
    tiles_across = ceil_div(out_width, most);
    cols = ceil_div(ceil_div(out_width, tiles_across), lanes) * lanes;
    tiles_across = ceil_div(out_width, cols);
    rows = 1;
  } else {
    tiles_across = 1;
    cols = out_width;
    rows = std::min(out_height, (most - out_width) / row + 1);
    rows = ceil_div(out_height, ceil_div(out_height, rows));
  }
  tiles_down = ceil_div(out_height, rows);
  panel_rows = static_cast<int32_t>(rows + shift_y);
  panel_cols = static_cast<int32_t>(copies_x ? ceil_div(cols, unit) * unit : cols + shift_x);
  vectors = static_cast<int>(ceil_div((rows - 1) * panel_cols + cols, lanes));
  const int64_t floats = static_cast<int64_t>(phases.size() / 2) * panel_rows * panel_cols;
  channel_floats = ceil_div(floats, lanes) * lanes;
}

Tiling::Tap Tiling::tap(const secateur_spec &spec, int ky, int kx) const {
  const int y = ky * spec.dilation[0], x = kx * spec.dilation[1];
  Tap tap = {{y, x}, 0, 0};
  if (!copies_y) tap = {{y % spec.stride[0], x}, y / spec.stride[0], 0};
  if (!copies_x) {
    tap.phase[1] = x % spec.stride[1];
    tap.across = x / spec.stride[1];
  }
  return tap;
}

int64_t Tiling::shift(const secateur_spec &spec, int ky, int kx) const {
  if (plain) return 0;
  const Tap tap = this->tap(spec, ky, kx);
  int64_t phase = 0;
  while (phases[2 * phase] != tap.phase[0] || phases[2 * phase + 1] != tap.phase[1]) ++phase;
  return (phase * panel_rows + tap.down) * panel_cols + tap.across;
}

}  // namespace secateur
