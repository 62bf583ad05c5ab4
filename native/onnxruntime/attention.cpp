#include "attention.h"

namespace secateur::ops {

std::unique_ptr<AttentionKernel> AttentionKernel::make(const Operator &op, const ort::Api &api,
                                                       const ort::KernelInfo *info) {
  const Node node(api, info, op.name);
  require_version(node);
  auto kernel = std::make_unique<AttentionKernel>();
  kernel->api = &api;
  kernel->heads = node.integer("heads");
  kernel->scale = node.real("scale");
  kernel->threads = threads_of(node, op.has_config_entries);
  kernel->who = node.who();
  if (kernel->heads < 1) node.refuse("it has " + std::to_string(kernel->heads) + " heads.");
  return kernel;
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
  const std::vector<int64_t> shape = {batch, sizes.queries, value_width};
  ort::Value *output = nullptr;
  void *y = nullptr;
  require(*api, api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output), who);
  require(*api, api->GetTensorMutableData(output, &y), who);
  if (batch == 0 || sizes.queries == 0 || value_width == 0) return;
  const auto floats = [](const Tensor &tensor) { return static_cast<const float *>(tensor.data); };
  Spread spread{*api, context};
  const int code = secateur_attention_run(&sizes, nullptr, floats(q), floats(k), floats(v),
                                          floats(mask), static_cast<float *>(y),
                                          threads > 1 ? Spread::run : nullptr, &spread, threads);
  require(*api, spread.status, who);
  if (code != SECATEUR_OK) {
    throw Refusal{code == SECATEUR_NO_MEMORY ? ort::FAIL : ort::INVALID_ARGUMENT,
                  who + ": " + secateur_last_error() + "."};
  }
}

}  // namespace secateur::ops
