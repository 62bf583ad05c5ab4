#include "depthwise.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace secateur {

bool Depthwise::suits(const secateur_spec &spec) {
  return spec.kind == SECATEUR_CONV && spec.inputs == 1 && spec.kernel[0] == spec.kernel[1] &&
         (spec.kernel[0] == 3 || spec.kernel[0] == 5) && spec.stride[0] == spec.stride[1] &&
         spec.stride[0] <= 2 && spec.dilation[0] == 1 && spec.dilation[1] == 1 &&
         spec.pads[1] < spec.kernel[1];
}

Depthwise::Depthwise(const secateur_spec &spec, const Weights &weights, const KernelTable &table)
    : spec_(spec), table_(table), narrower_(narrower(table)), bias_(weights.bias) {
  const int64_t taps = weights.columns;
  weights_.resize(static_cast<size_t>(weights.rows * taps));
  for (int64_t row = 0; row < weights.rows; ++row) {
    for (int64_t i = weights.starts[row]; i < weights.starts[row + 1]; ++i) {
      weights_[row * taps + weights.column[i]] = weights.value[i];
    }
  }
}

void Depthwise::run(const float *x, const int64_t dims[3], const int64_t out[3],
                    const float *residual, float *y, const Parallel &parallel) const {
  const int64_t in_plane = dims[1] * dims[2], out_plane = out[1] * out[2];
  const int64_t outputs = spec_.outputs;
  const float *const x_end = x + dims[0] * spec_.groups * in_plane;
  const int64_t planes = dims[0] * outputs;
  const int64_t most = int64_t{8} * parallel.threads;
  const int64_t chunk = std::max<int64_t>(1, (planes + most - 1) / most);
  parallel(static_cast<size_t>((planes + chunk - 1) / chunk), [&](size_t task) {
    const int64_t stop = std::min(planes, (static_cast<int64_t>(task) + 1) * chunk);
    for (int64_t i = static_cast<int64_t>(task) * chunk; i < stop;) {
      const int64_t image = i / outputs, next = std::min(stop, (image + 1) * outputs);
      const int64_t to = image * outputs * out_plane;
      run_channels({x + image * spec_.groups * in_plane, x, x_end, in_plane, dims[1], dims[2],
                    spec_.pads[0], residual ? residual + to : nullptr, y + to, out_plane, out[1],
                    out[2]},
                   i - image * outputs, next - image * outputs);
      i = next;
    }
  });
}

void Depthwise::run_channels(const Band &band, int64_t first, int64_t stop) const {
  const KernelTable &table = band.out_width <= narrower_.lanes ? narrower_ : table_;
  const int64_t of_group = spec_.outputs / spec_.groups;
  const int64_t taps = int64_t{spec_.kernel[0]} * spec_.kernel[1];
  const int64_t floats = band.height * band.width;
  // A kernel may read so many floats before and behind a channel: it loads whole vectors, and the
  // columns of the right padding lie behind the last row.
  const int64_t before = spec_.kernel[1];
  const int64_t behind = 2 * spec_.stride[0] * table.lanes + spec_.kernel[1] + spec_.pads[3];
  std::vector<float> copy;
  for (int64_t row = first, count = 1; row < stop; row += count) {
    const float *x = band.x + row / of_group * band.x_plane;
    count = 1;
    if (x - band.begin < before || band.end - x < floats + behind) {  // the first and the last
      copy.assign(static_cast<size_t>(before + floats + behind), 0.0f);
      std::memcpy(copy.data() + before, x, sizeof(float) * static_cast<size_t>(floats));
      x = copy.data() + before;
    } else if (of_group == 1) {  // as many as lie one after the other, like their weights
      const int64_t inside = (band.end - x - floats - behind) / band.x_plane + 1;
      count = std::min(stop - row, inside);
    }
    const int64_t to = row * band.y_plane;
    table.depthwise({x, band.y + to, band.residual ? band.residual + to : nullptr,
                     weights_.data() + row * taps, bias_.data() + row, count, band.height, band.width,
                     band.out_height, band.out_width, band.x_plane, band.y_plane, band.pad_y,
                     spec_.pads[1], spec_.kernel[0], spec_.stride[0],
                     {spec_.activation, spec_.alpha, spec_.beta}});
  }
}

}  // namespace secateur
