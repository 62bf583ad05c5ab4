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
  const int64_t outputs = spec_.outputs, of_group = outputs / spec_.groups;
  const int64_t taps = int64_t{spec_.kernel[0]} * spec_.kernel[1];
  const float *const x_end = x + dims[0] * spec_.groups * in_plane;
  // A kernel may read so many floats before and behind a channel: it loads whole vectors, and the
  // columns of the right padding lie behind the last row.
  const KernelTable &table = out[2] <= narrower_.lanes ? narrower_ : table_;
  const int64_t before = spec_.kernel[1];
  const int64_t behind = 2 * spec_.stride[0] * table.lanes + spec_.kernel[1] + spec_.pads[3];
  const int64_t planes = dims[0] * outputs;
  const int64_t most = int64_t{8} * parallel.threads;
  const int64_t chunk = std::max<int64_t>(1, (planes + most - 1) / most);
  parallel(static_cast<size_t>((planes + chunk - 1) / chunk), [&](size_t task) {
    std::vector<float> copy;
    const int64_t first = static_cast<int64_t>(task) * chunk;
    const int64_t stop = std::min(planes, first + chunk);
    for (int64_t i = first, count = 1; i < stop; i += count) {
      const int64_t row = i % outputs;
      const float *plane = x + (i / outputs * spec_.groups + row / of_group) * in_plane;
      count = 1;
      if (plane - x < before || x_end - plane < in_plane + behind) {  // the first and the last
        copy.assign(static_cast<size_t>(before + in_plane + behind), 0.0f);
        std::memcpy(copy.data() + before, plane, sizeof(float) * static_cast<size_t>(in_plane));
        plane = copy.data() + before;
      } else if (of_group == 1) {  // as many as lie one after the other, like their weights
        const int64_t inside = (x_end - plane - behind) / in_plane;
        count = std::min({stop - i, outputs - row, inside});
      }
      table.depthwise({plane, y + i * out_plane, residual ? residual + i * out_plane : nullptr,
                       weights_.data() + row * taps, bias_.data() + row, count, dims[1], dims[2],
                       out[1], out[2], spec_.pads[0], spec_.pads[1], spec_.kernel[0],
                       spec_.stride[0], {spec_.activation, spec_.alpha, spec_.beta}});
    }
  });
}

}  // namespace secateur
