#include "packed.h"

#include <algorithm>

namespace secateur::ops {
namespace {

secateur_spec read_spec(const Node &node, int32_t kind, const std::string &suffix) {
  secateur_spec spec = {};
  spec.kind = kind;
  spec.outputs = node.integer("outputs" + suffix);
  spec.inputs = node.integer("inputs" + suffix);
  spec.activation = node.integer("activation" + suffix);
  spec.alpha = node.real("alpha" + suffix);
  spec.beta = node.real("beta" + suffix);
  spec.groups = 1;
  for (int axis = 0; axis < 2; ++axis) {
    spec.kernel[axis] = spec.stride[axis] = spec.dilation[axis] = 1;
  }
  if (kind == SECATEUR_CONV) {
    spec.groups = node.integer("group" + suffix);
    node.integers("kernel" + suffix, spec.kernel);
    node.integers("strides" + suffix, spec.stride);
    node.integers("dilations" + suffix, spec.dilation);
    node.integers("pads" + suffix, spec.pads);
  }
  return spec;
}

secateur_weights read_weights(const Node &node, const Packed &where, int32_t outputs) {
  const std::string names[] = {"values" + where.suffix, "index" + where.suffix};
  secateur_weights weights = {};
  const Tensor values = node.constant(where.values, names[0]);
  const Tensor index = node.constant(where.values + 1, names[1]);
  weights.layout = node.integer("layout" + where.suffix);
  weights.values = values.data;
  weights.count = values.dims[0];
  if (values.type == ort::FLOAT) {
    weights.dtype = SECATEUR_FLOAT32;
  } else if (values.type == ort::BFLOAT16) {
    weights.dtype = SECATEUR_BFLOAT16;
  } else if (values.type == ort::FLOAT16) {
    weights.dtype = SECATEUR_FLOAT16;
  } else {
    node.refuse("its input '" + names[0] + "' has ONNX's type " + std::to_string(values.type) +
                ". Weights are float32 (1), float16 (10) or bfloat16 (16).");
  }
  if (index.type != ort::UINT8) {
    node.refuse("its input '" + names[1] + "' has ONNX's type " + std::to_string(index.type) +
                ". An index is a row of bytes, uint8 (2).");
  }
  weights.index = static_cast<const uint8_t *>(index.data);
  weights.index_bytes = index.dims[0];
  const size_t bias = where.values + 2;
  if (node.has(bias)) weights.bias = read_floats(node, bias, "bias" + where.suffix, outputs);
  return weights;
}

// The variant that the file asks for, or our first guess if the file was made for vectors of
// another width: what was fastest there says little here.
secateur_variant read_variant(const Node &node, const std::string &suffix,
                              const secateur_spec &spec, const secateur_weights &weights) {
  secateur_variant variant = {node.integer("family" + suffix), node.integer("rows" + suffix),
                              node.integer("vectors" + suffix), node.integer("columns" + suffix)};
  if (node.integer("isa_lanes" + suffix) == secateur_lanes(nullptr)) return variant;
  const double entries =
      1.0 * spec.outputs * spec.inputs * spec.kernel[0] * spec.kernel[1];
  const double density = entries > 0 ? std::min(1.0, weights.count / entries) : 1.0;
  const int positions = std::max(1, node.integer_or("positions" + suffix, 196));
  secateur_variant first = {};
  return secateur_candidates(&spec, positions, density, nullptr, &first, 1) > 0 ? first : variant;
}

}  // namespace

const float *read_floats(const Node &node, size_t input, const std::string &called, int32_t outputs) {
  const Tensor found = node.constant(input, called);
  if (found.type != ort::FLOAT || found.dims[0] != outputs) {
    node.refuse("its input '" + called + "' has ONNX's type " + std::to_string(found.type) +
                " and " + std::to_string(found.dims[0]) +
                " entries. It must be float32 (1) with one entry for each of the " +
                std::to_string(outputs) + " outputs.");
  }
  return static_cast<const float *>(found.data);
}

PackedLayer::PackedLayer(const Node &node, int32_t kind, const Packed &where)
    : spec(read_spec(node, kind, where.suffix)) {
  const secateur_weights weights = read_weights(node, where, spec.outputs);
  const secateur_variant variant = read_variant(node, where.suffix, spec, weights);
  secateur_layer *made = nullptr;
  const int code = secateur_layer_create(&spec, &weights, &variant, nullptr, &made);
  require_ok(node.who(), code, ort::INVALID_GRAPH);
  layer.reset(made);
}

Tensor LayerKernel::read_x(ort::KernelContext *context) const {
  const ort::Value *input = nullptr;
  require(*api, api->KernelContext_GetInput(context, 0, &input), who);
  if (!input) refuse("it got no X.");
  const Tensor x = read_tensor(*api, input, who);
  if (x.type != ort::FLOAT) {
    refuse("X has ONNX's type " + std::to_string(x.type) +
           ", and this operator takes float32 (1).");
  }
  return x;
}

void LayerKernel::require_image(const Tensor &x, int64_t channels) const {
  if (x.dims.size() != 4 || x.dims[1] != channels) {
    refuse("X has the shape " + text(x.dims) + ", and this layer takes [batch, " +
           std::to_string(channels) + ", height, width].");
  }
}

Tensor LayerKernel::read_residual(ort::KernelContext *context, size_t input,
                                  const std::vector<int64_t> &shape) const {
  size_t inputs = 0;
  const ort::Value *added = nullptr;
  require(*api, api->KernelContext_GetInputCount(context, &inputs), who);
  if (inputs > input) require(*api, api->KernelContext_GetInput(context, input, &added), who);
  if (!added) return {};
  Tensor residual = read_tensor(*api, added, who);
  if (residual.type != ort::FLOAT || residual.dims != shape) {
    refuse("the residual has ONNX's type " + std::to_string(residual.type) + " and the shape " +
           text(residual.dims) + ", and it must be float32 (1) like the output, " + text(shape) +
           ".");
  }
  return residual;
}

}  // namespace secateur::ops
