#include "chain.h"

namespace secateur::ops {

std::unique_ptr<ChainKernel> ChainKernel::make(const Operator &op, const ort::Api &api,
                                               const ort::KernelInfo *info) {
  return std::make_unique<ChainKernel>(api, op, Node(api, info, op.name));
}

ChainKernel::ChainKernel(const ort::Api &api, const Operator &op, const Node &node)
    : LayerKernel(api, op, node) {
  const int32_t count = node.integer("layers");
  if (count < 2 || count > static_cast<int32_t>(MOST)) {
    node.refuse("it has " + std::to_string(count) + " layers, and a chain has from 2 to " +
                std::to_string(MOST) + ".");
  }
  std::vector<const secateur_layer *> held;
  for (int32_t i = 0; i < count; ++i) {
    layers.emplace_back(node, SECATEUR_CONV,
                        Packed{PACKED + 3 * static_cast<size_t>(i), "_" + std::to_string(i)});
    held.push_back(layers.back().layer.get());
  }
  secateur_chain *made = nullptr;
  require_ok(secateur_chain_create(held.data(), count, &made), ort::INVALID_GRAPH);
  chain.reset(made);
}

void ChainKernel::run(ort::KernelContext *context) const {
  const secateur_spec &first = layers.front().spec;
  const Tensor x = read_x(context);
  require_image(x, static_cast<int64_t>(first.inputs) * first.groups);
  const int64_t dims[3] = {x.dims[0], x.dims[2], x.dims[3]};
  int64_t out[3] = {};
  if (secateur_chain_shape(chain.get(), dims, out) != SECATEUR_OK) {
    refuse("X has the shape " + text(x.dims) + ": " + secateur_last_error() + ".");
  }
  const std::vector<int64_t> shape = {dims[0], layers.back().spec.outputs, out[1], out[2]};
  const Tensor residual = read_residual(context, RESIDUAL, shape);
  float *const y = output(context, shape);
  if (dims[0] == 0) return;
  on_threads(context, [&](auto parallel, void *state, int count) {
    return secateur_chain_run(chain.get(), floats(x), dims, floats(residual), y, parallel, state,
                              count);
  });
}

}  // namespace secateur::ops
