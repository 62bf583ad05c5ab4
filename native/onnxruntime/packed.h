// A sparse layer as nodes hold it, and what the kernels that run such layers share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "operator.h"

namespace secateur::ops {

// Where a node holds a layer: attributes with a suffix, and three constant inputs from `values` on: values,
// index and bias, of which the last may be left out.
struct Packed {
  size_t values = 1;
  std::string suffix;
};

struct PackedLayer {
  secateur_spec spec;
  std::unique_ptr<secateur_layer, void (*)(secateur_layer *)> layer{nullptr,
                                                                  secateur_layer_destroy};

  PackedLayer(const Node &node, int32_t kind, const Packed &where);
};

// A constant input with a number for every output.
const float *read_floats(const Node &node, size_t input, const std::string &called, int32_t outputs);

struct LayerKernel : KernelBase {
  using KernelBase::KernelBase;

  Tensor read_x(ort::KernelContext *context) const;
  void require_image(const Tensor &x, int64_t channels) const;
  // No data if the input is left out.
  Tensor read_residual(ort::KernelContext *context, size_t input,
                       const std::vector<int64_t> &shape) const;
};

}  // namespace secateur::ops
