// Layers that run one after the other, band by band: what one hands to the next stays in the second cache.
//
// Around a depthwise convolution a network is widest: its largest activations live between these layers
// only, and to write them out and read them back may take longer than to compute them. A band of rows of the last output needs a band of rows of every layer before, some more
// where a kernel has several rows; these are computed again by the band next to it.
#pragma once

#include <vector>

#include "layer.h"

namespace secateur {

class Chain {
 public:
  // At least two layers, which must outlive the chain. Throws Error if they do not fit together, or one
  // does not take bands.
  explicit Chain(std::vector<const Layer *> layers);

  // As for a layer; the residual is added by the last one.
  void shape(const int64_t dims[3], int64_t out[3]) const;
  void run(const float *x, const int64_t dims[3], const float *residual, float *y,
           const Parallel &asked) const;

 private:
  // The input of each layer, and the last output.
  struct Image {
    int64_t channels, height, width;
  };
  struct Rows {
    int64_t begin, end;
    int32_t pad;  // rows of padding above them
  };
  struct Run;

  std::vector<Image> images(const int64_t dims[3]) const;
  std::vector<Rows> rows_for(const std::vector<Image> &images, Rows last) const;
  int64_t floats(const std::vector<Image> &images, const std::vector<Rows> &rows) const;
  int64_t bands_for(const std::vector<Image> &images, int threads) const;
  void run_band(const Run &run, int64_t image, Rows last) const;

  std::vector<const Layer *> layers_;
};

}  // namespace secateur
