// The operators SparseConv and SparseLinear of ONNX Runtime, on top of the C interface of secateur.h, and
// what registers all of ours. A kernel is made from constants alone: its attributes and its packed weights.
// Whatever is wrong with them becomes an error of the session's creation, and whatever is wrong
// with an input an error of the run. Nothing here is thrown across the C interface.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "operator.h"

namespace secateur::ops {
namespace {

constexpr const char *DOMAIN = "secateur";
// Tells that options know our operators: to register them twice is an error of ONNX Runtime.
constexpr const char *REGISTERED_ENTRY = "secateur.registered";

secateur_spec read_spec(const Node &node, int32_t kind) {
  secateur_spec spec = {};
  spec.kind = kind;
  spec.outputs = node.integer("outputs");
  spec.inputs = node.integer("inputs");
  spec.activation = node.integer("activation");
  spec.alpha = node.real("alpha");
  spec.beta = node.real("beta");
  spec.groups = 1;
  for (int axis = 0; axis < 2; ++axis) {
    spec.kernel[axis] = spec.stride[axis] = spec.dilation[axis] = 1;
  }
  if (kind == SECATEUR_CONV) {
    spec.groups = node.integer("group");
    node.integers("kernel", spec.kernel);
    node.integers("strides", spec.stride);
    node.integers("dilations", spec.dilation);
    node.integers("pads", spec.pads);
  }
  return spec;
}

// A constant input with a number for every output.
const float *read_floats(const Node &node, Input input, int32_t outputs) {
  const Tensor found = node.constant(input);
  if (found.type != ort::FLOAT || found.dims[0] != outputs) {
    node.refuse(std::string("its input '") + INPUT_NAMES[input] + "' has ONNX's type " +
                std::to_string(found.type) + " and " + std::to_string(found.dims[0]) +
                " entries. It must be float32 (1) with one entry for each of the " +
                std::to_string(outputs) + " outputs.");
  }
  return static_cast<const float *>(found.data);
}

secateur_weights read_weights(const Node &node, const secateur_spec &spec) {
  secateur_weights weights = {};
  const Tensor values = node.constant(VALUES), index = node.constant(INDEX);
  weights.layout = node.integer("layout");
  weights.values = values.data;
  weights.count = values.dims[0];
  if (values.type == ort::FLOAT) {
    weights.dtype = SECATEUR_FLOAT32;
  } else if (values.type == ort::BFLOAT16) {
    weights.dtype = SECATEUR_BFLOAT16;
  } else if (values.type == ort::FLOAT16) {
    weights.dtype = SECATEUR_FLOAT16;
  } else {
    node.refuse("its input 'values' has ONNX's type " + std::to_string(values.type) +
                ". Weights are float32 (1), float16 (10) or bfloat16 (16).");
  }
  if (index.type != ort::UINT8) {
    node.refuse("its input 'index' has ONNX's type " + std::to_string(index.type) +
                ". An index is a row of bytes, uint8 (2).");
  }
  weights.index = static_cast<const uint8_t *>(index.data);
  weights.index_bytes = index.dims[0];
  if (node.has(BIAS)) weights.bias = read_floats(node, BIAS, spec.outputs);
  return weights;
}

// The variant that the file asks for, or our first guess if the file was made for vectors of
// another width: what was fastest there says little here.
secateur_variant read_variant(const Node &node, const secateur_spec &spec,
                              const secateur_weights &weights) {
  secateur_variant variant = {node.integer("family"), node.integer("rows"),
                              node.integer("vectors"), node.integer("columns")};
  if (node.integer("isa_lanes") == secateur_lanes(nullptr)) return variant;
  const double entries =
      1.0 * spec.outputs * spec.inputs * spec.kernel[0] * spec.kernel[1];
  const double density = entries > 0 ? std::min(1.0, weights.count / entries) : 1.0;
  const int positions = std::max(1, node.integer_or("positions", 196));
  secateur_variant first = {};
  return secateur_candidates(&spec, positions, density, nullptr, &first, 1) > 0 ? first : variant;
}

struct Kernel : KernelBase {
  static constexpr size_t INPUTS = ops::INPUTS, REQUIRED = BIAS;
  static ort::ElementType input_type(size_t index) {
    return index == VALUES ? ort::UNDEFINED : index == INDEX ? ort::UINT8 : ort::FLOAT;
  }

  secateur_spec spec;
  std::unique_ptr<secateur_layer, void (*)(secateur_layer *)> layer{nullptr,
                                                                  secateur_layer_destroy};

  Kernel(const ort::Api &api, const Operator &op, const Node &node, int32_t kind);
  void run(ort::KernelContext *context) const;
};

template <int32_t KIND>
struct KernelOf : Kernel {
  using Kernel::Kernel;
  static std::unique_ptr<KernelOf> make(const Operator &op, const ort::Api &api,
                                        const ort::KernelInfo *info) {
    return std::make_unique<KernelOf>(api, op, Node(api, info, op.name), KIND);
  }
};

Kernel::Kernel(const ort::Api &api, const Operator &op, const Node &node, int32_t kind)
    : KernelBase(api, op, node), spec(read_spec(node, kind)) {
  const secateur_weights weights = read_weights(node, spec);
  const secateur_variant variant = read_variant(node, spec, weights);
  secateur_layer *made = nullptr;
  require_ok(secateur_layer_create(&spec, &weights, &variant, nullptr, &made), ort::INVALID_GRAPH);
  layer.reset(made);
  if (!node.has(SCALE)) return;
  const float *const scale = read_floats(node, SCALE, spec.outputs);
  const float *const shift = node.has(SHIFT) ? read_floats(node, SHIFT, spec.outputs) : nullptr;
  require_ok(secateur_layer_normalise(made, scale, shift, node.real("epsilon")), ort::INVALID_GRAPH);
}

void Kernel::run(ort::KernelContext *context) const {
  const ort::Value *input = nullptr;
  require(*api, api->KernelContext_GetInput(context, X, &input), who);
  if (!input) refuse("it got no X.");
  const Tensor x = read_tensor(*api, input, who);
  const int64_t features = static_cast<int64_t>(spec.inputs) * spec.groups;
  int64_t dims[3] = {1, 1, 1}, out[3] = {};
  std::vector<int64_t> shape = x.dims;
  if (x.type != ort::FLOAT) {
    refuse("X has ONNX's type " + std::to_string(x.type) +
           ", and this operator takes float32 (1).");
  }
  if (spec.kind == SECATEUR_CONV) {
    if (x.dims.size() != 4 || x.dims[1] != features) {
      refuse("X has the shape " + text(x.dims) + ", and this layer takes [batch, " +
             std::to_string(features) + ", height, width].");
    }
    dims[0] = x.dims[0], dims[1] = x.dims[2], dims[2] = x.dims[3];
  } else {
    if (x.dims.empty() || x.dims.back() != features) {
      refuse("X has the shape " + text(x.dims) + ", and this layer takes [..., " +
             std::to_string(features) + "].");
    }
    for (size_t axis = 0; axis + 1 < x.dims.size(); ++axis) dims[0] *= x.dims[axis];
  }
  if (spec.kind == SECATEUR_CONV) {
    if (secateur_layer_shape(layer.get(), dims, out) != SECATEUR_OK) {
      refuse("X has the shape " + text(x.dims) + ": " + secateur_last_error() + ".");
    }
    shape = {dims[0], spec.outputs, out[1], out[2]};
  } else {
    shape.back() = spec.outputs;
  }

  size_t inputs = 0;
  const ort::Value *added = nullptr;
  require(*api, api->KernelContext_GetInputCount(context, &inputs), who);
  if (inputs > RESIDUAL) require(*api, api->KernelContext_GetInput(context, RESIDUAL, &added), who);
  Tensor residual;
  if (added) {
    residual = read_tensor(*api, added, who);
    if (residual.type != ort::FLOAT || residual.dims != shape) {
      refuse("the residual has ONNX's type " + std::to_string(residual.type) + " and the shape " +
             text(residual.dims) + ", and it must be float32 (1) like the output, " + text(shape) +
             ".");
    }
  }

  float *const y = output(context, shape);
  if (dims[0] == 0) return;
  on_threads(context, [&](auto parallel, void *state, int count) {
    return secateur_layer_run(layer.get(), floats(x), dims, floats(residual), y, parallel, state,
                              count);
  });
}

// The operators as one copy of ONNX Runtime got them. All its sessions share them, and they are
// never freed: a session may outlive every moment that we could choose.
struct Registration {
  const ort::ApiBase *base;
  Operator operators[3];
  ort::CustomOpDomain *domain = nullptr;
};

ort::CustomOpDomain *domain_of(const ort::ApiBase *base, const ort::Api &api) {
  static std::mutex mutex;
  static auto *registrations = new std::vector<std::unique_ptr<Registration>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto &known : *registrations) {
    if (known->base == base) return known->domain;
  }
  // Of "1.31.1" the second number. Asking for a table that is too new would print an error.
  const char *minor = std::strchr(base->GetVersionString(), '.');
  const bool recent = minor && std::atoi(minor + 1) >= ort::VERSION_OF_CONFIG_ENTRIES;
  auto made = std::make_unique<Registration>();
  made->base = base;
  made->operators[0] = make_operator<KernelOf<SECATEUR_CONV>>("SparseConv", recent);
  made->operators[1] = make_operator<KernelOf<SECATEUR_LINEAR>>("SparseLinear", recent);
  made->operators[2] = make_operator<AttentionKernel>("Attention", recent);
  require(api, api.CreateCustomOpDomain(DOMAIN, &made->domain), "secateur");
  for (Operator &op : made->operators) {
    require(api, api.CustomOpDomain_Add(made->domain, &op), "secateur");
  }
  registrations->push_back(std::move(made));
  return registrations->back()->domain;
}

}  // namespace
}  // namespace secateur::ops

// What ONNX Runtime looks up in a library of operators.
extern "C" SECATEUR_EXPORT secateur::ort::Status *RegisterCustomOps(
    secateur::ort::SessionOptions *options, const secateur::ort::ApiBase *base) {
  using namespace secateur;
  using namespace secateur::ops;
  const ort::Api *api = base->GetApi(ort::VERSION);
  if (!api) {
    const std::string message =
        std::string("secateur needs ONNX Runtime 1.17 or newer, and this is ") +
        base->GetVersionString() + ".";
    return base->GetApi(1)->CreateStatus(ort::FAIL, message.c_str());
  }
  return guarded(*api, [&] {
    int known = 0;
    require(*api, api->HasSessionConfigEntry(options, REGISTERED_ENTRY, &known), "secateur");
    if (known) return;
    require(*api, api->AddCustomOpDomain(options, domain_of(base, *api)), "secateur");
    require(*api, api->AddSessionConfigEntry(options, REGISTERED_ENTRY, "1"), "secateur");
  });
}
