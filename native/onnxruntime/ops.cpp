// The operators SparseConv and SparseLinear of ONNX Runtime, on top of the C interface of secateur.h, and
// what registers all of ours. A kernel is made from constants alone: its attributes and its packed weights.
// Whatever is wrong with them becomes an error of the session's creation, and whatever is wrong
// with an input an error of the run. Nothing here is thrown across the C interface.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "chain.h"
#include "packed.h"

namespace secateur::ops {
namespace {

constexpr const char *DOMAIN = "secateur";
// Tells that options know our operators: to register them twice is an error of ONNX Runtime.
constexpr const char *REGISTERED_ENTRY = "secateur.registered";

// The inputs of SparseConv and SparseLinear.
enum Input : size_t {
  X = 0, VALUES = 1, INDEX = 2, BIAS = 3, RESIDUAL = 4, SCALE = 5, SHIFT = 6, INPUTS = 7
};

struct Kernel : LayerKernel {
  static constexpr size_t INPUTS = ops::INPUTS, REQUIRED = BIAS;
  static ort::ElementType input_type(size_t index) {
    return index == VALUES ? ort::UNDEFINED : index == INDEX ? ort::UINT8 : ort::FLOAT;
  }

  PackedLayer packed;

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
    : LayerKernel(api, op, node), packed(node, kind, {VALUES, ""}) {
  if (!node.has(SCALE)) return;
  const int32_t outputs = packed.spec.outputs;
  const float *const scale = read_floats(node, SCALE, "scale", outputs);
  const float *const shift =
      node.has(SHIFT) ? read_floats(node, SHIFT, "shift", outputs) : nullptr;
  require_ok(secateur_layer_normalise(packed.layer.get(), scale, shift, node.real("epsilon")),
             ort::INVALID_GRAPH);
}

void Kernel::run(ort::KernelContext *context) const {
  const secateur_spec &spec = packed.spec;
  const Tensor x = read_x(context);
  const int64_t features = static_cast<int64_t>(spec.inputs) * spec.groups;
  int64_t dims[3] = {1, 1, 1}, out[3] = {};
  std::vector<int64_t> shape = x.dims;
  if (spec.kind == SECATEUR_CONV) {
    require_image(x, features);
    dims[0] = x.dims[0], dims[1] = x.dims[2], dims[2] = x.dims[3];
    if (secateur_layer_shape(packed.layer.get(), dims, out) != SECATEUR_OK) {
      refuse("X has the shape " + text(x.dims) + ": " + secateur_last_error() + ".");
    }
    shape = {dims[0], spec.outputs, out[1], out[2]};
  } else {
    if (x.dims.empty() || x.dims.back() != features) {
      refuse("X has the shape " + text(x.dims) + ", and this layer takes [..., " +
             std::to_string(features) + "].");
    }
    for (size_t axis = 0; axis + 1 < x.dims.size(); ++axis) dims[0] *= x.dims[axis];
    shape.back() = spec.outputs;
  }
  const Tensor residual = read_residual(context, RESIDUAL, shape);
  float *const y = output(context, shape);
  if (dims[0] == 0) return;
  on_threads(context, [&](auto parallel, void *state, int count) {
    return secateur_layer_run(packed.layer.get(), floats(x), dims, floats(residual), y, parallel,
                              state, count);
  });
}

// The operators as one copy of ONNX Runtime got them. All its sessions share them, and they are
// never freed: a session may outlive every moment that we could choose.
struct Registration {
  const ort::ApiBase *base;
  Operator operators[4];
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
  made->operators[3] = make_operator<ChainKernel>("SparseChain", recent);
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
