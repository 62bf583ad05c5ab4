#include "attention.h"

namespace secateur::ops {

std::unique_ptr<AttentionKernel> AttentionKernel::make(const Operator &op, const ort::Api &api,
                                                       const ort::KernelInfo *info) {
  return std::make_unique<AttentionKernel>(api, op, Node(api, info, op.name));
}

AttentionKernel::AttentionKernel(const ort::Api &api, const Operator &op, const Node &node)
    : KernelBase(api, op, node), heads(node.integer("heads")), scale(node.real("scale")) {
  if (heads < 1) node.refuse("it has " + std::to_string(heads) + " heads.");
}

// No data if the input is left out.
Tensor AttentionKernel::read(ort::KernelContext *context, size_t input) const {
  constexpr const char *names[INPUTS] = {"queries", "keys", "values", "mask"};
  const ort::Value *value = nullptr;
  size_t inputs = 0;
  require(*api, api->KernelContext_GetInputCount(context, &inputs), who);
  if (input < inputs) require(*api, api->KernelContext_GetInput(context, input, &value), who);
  if (!value) {
    if (input < REQUIRED) refuse(std::string("it got no ") + names[input] + ".");
    return {};
  }
  Tensor tensor = read_tensor(*api, value, who);
  const size_t rank = input < REQUIRED ? 3 : 4;
  if (tensor.type != ort::FLOAT || tensor.dims.size() != rank) {
    refuse(std::string("the ") + names[input] + " have ONNX's type " + std::to_string(tensor.type) +
           " and the shape " + text(tensor.dims) + ", and must be float32 (1) with " +
           std::to_string(rank) + " axes.");
  }
  return tensor;
}

void AttentionKernel::run(ort::KernelContext *context) const {
  const Tensor q = read(context, 0), k = read(context, 1), v = read(context, 2);
  const Tensor mask = read(context, 3);
  const int64_t batch = q.dims[0], width = q.dims[2], value_width = v.dims[2];
  if (k.dims != std::vector<int64_t>{batch, k.dims[1], width} || v.dims[0] != batch ||
      v.dims[1] != k.dims[1] || width % heads || value_width % heads) {
    refuse("queries of shape " + text(q.dims) + ", keys " + text(k.dims) + " and values " +
           text(v.dims) + " do not fit together, or cannot be split into " + std::to_string(heads) +
           " heads.");
  }
  secateur_attention sizes = {batch, q.dims[1], k.dims[1], heads,
                              static_cast<int32_t>(width / heads),
                              static_cast<int32_t>(value_width / heads), scale, 1, 1};
  if (mask.data) {
    const std::vector<int64_t> &m = mask.dims;
    if ((m[0] != 1 && m[0] != batch) || (m[1] != 1 && m[1] != heads) || m[2] != sizes.queries ||
        m[3] != sizes.keys) {
      refuse("the mask has the shape " + text(m) + ", and must have [" + std::to_string(batch) +
             " or 1, " + std::to_string(heads) + " or 1, " + std::to_string(sizes.queries) + ", " +
             std::to_string(sizes.keys) + "].");
    }
    sizes.mask_batch = m[0], sizes.mask_heads = static_cast<int32_t>(m[1]);
  }
  float *const y = output(context, {batch, sizes.queries, value_width});
  if (batch == 0 || sizes.queries == 0 || value_width == 0) return;
  on_threads(context, [&](auto parallel, void *state, int count) {
    return secateur_attention_run(&sizes, nullptr, floats(q), floats(k), floats(v), floats(mask), y,
                                  parallel, state, count);
  });
}

}  // namespace secateur::ops
