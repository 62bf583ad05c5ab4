// The layer of the family DEPTHWISE: dense kernels of 3 x 3 or 5 x 5 on one channel each.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"
#include "layer/band.h"
#include "layer/spec.h"

namespace secateur {

class Depthwise {
 public:
  // Whether a layer is one: one input channel a group, a square kernel of 3 or 5, stride 1 or 2.
  static bool suits(const secateur_spec &spec);

  Depthwise(const secateur_spec &spec, const Weights &weights, const KernelTable &table);

  // dims: n, h, w of the input; out: those of the output.
  void run(const float *x, const int64_t dims[3], const int64_t out[3], const float *residual,
           float *y, const Parallel &parallel) const;
  // The channels [first, stop) of one image, or of some of its rows.
  void run_channels(const Band &band, int64_t first, int64_t stop) const;

  int64_t bytes() const { return static_cast<int64_t>(weights_.size() * sizeof(float)); }

 private:
  secateur_spec spec_;
  const KernelTable &table_;
  const KernelTable &narrower_;
  std::vector<float> weights_;  // every tap, zeros too
  std::vector<float> bias_;
};

}  // namespace secateur
