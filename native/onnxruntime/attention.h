// The operator Attention: MultiHeadAttention of ONNX Runtime without its caches.
#pragma once

#include <memory>
#include <string>

#include "operator.h"

namespace secateur::ops {

// Inputs: queries [batch, queries, heads * size], keys [batch, keys, heads * size], values
// [batch, keys, heads * value size], and a mask [batch or 1, heads or 1, queries, keys] or none.
struct AttentionKernel : KernelBase {
  static constexpr size_t INPUTS = 4, REQUIRED = 3;
  static ort::ElementType input_type(size_t) { return ort::FLOAT; }
  static std::unique_ptr<AttentionKernel> make(const Operator &op, const ort::Api &api,
                                               const ort::KernelInfo *info);
  AttentionKernel(const ort::Api &api, const Operator &op, const Node &node);
  void run(ort::KernelContext *context) const;

 private:
  Tensor read(ort::KernelContext *context, size_t input) const;

  int32_t heads;
  float scale;
};

}  // namespace secateur::ops
