// The operator SparseChain: convolutions that run one after the other, band by band.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "packed.h"

namespace secateur::ops {

// Inputs: X, the residual of the last layer (may be left out), then values, index and bias of each layer.
// Attributes: the number of layers, and those of a SparseConv for each, which end in _0, _1 and so on.
struct ChainKernel : LayerKernel {
  static constexpr size_t MOST = 3, RESIDUAL = 1, PACKED = 2;
  static constexpr size_t INPUTS = PACKED + 3 * MOST, REQUIRED = 1;
  static ort::ElementType input_type(size_t index) {
    if (index < PACKED) return ort::FLOAT;
    const size_t part = (index - PACKED) % 3;
    return part == 0 ? ort::UNDEFINED : part == 1 ? ort::UINT8 : ort::FLOAT;
  }
  static std::unique_ptr<ChainKernel> make(const Operator &op, const ort::Api &api,
                                           const ort::KernelInfo *info);

  std::vector<PackedLayer> layers;
  std::unique_ptr<secateur_chain, void (*)(secateur_chain *)> chain{nullptr,
                                                                  secateur_chain_destroy};

  ChainKernel(const ort::Api &api, const Operator &op, const Node &node);
  void run(ort::KernelContext *context) const;
};

}  // namespace secateur::ops
